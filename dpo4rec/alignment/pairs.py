"""Preference pairs from Parquet, and the order in which they are trained on."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dpo4rec.errors import InputError
from dpo4rec.files import read_parquet, stable_seed

TEXTS = ("prompt", "chosen", "rejected")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Pair:
    """Token ids of one pair; completions end with the end token if it was sampled."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def read_pairs(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, max_tokens: int
) -> tuple[list[Pair], dict[str, int]]:
    """Reads the pairs that can be trained on, and counts the others by reason: "empty", "identical", "too_long".

    The columns `prompt_ids`, `chosen_ids`, `rejected_ids` are used as they are. A file without them (one made for TRL) has its
    `prompt`, `chosen` and `rejected` tokenised apart, with the end token after both completions.

    Args:
        tokenizer: used only for a file without ids.
        vocabulary: ids must be below this number.
        max_tokens: longest prompt + completion.

    Raises:
        InputError: the file is missing, damaged or lacks columns; a row is null or has an id out of range; no pair is left.
    """
    table = read_parquet(path)
    columns = _id_columns(table, path) if IDS[0] in table.column_names else _tokenized(table, path, tokenizer)
    kept, dropped = [], Counter[str]()
    for row, ids in enumerate(zip(*columns, strict=True)):
        _check(path, row, ids, vocabulary)
        pair = Pair(*ids)
        reason = _unusable(pair, max_tokens)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(pair)
    if not kept:
        raise InputError(
            str(path), f"no pair is left to train on (dropped: {dict(dropped) or 'none, the file is empty'})", "Look at how it was made"
        )
    return kept, dict(sorted(dropped.items()))


def schedule(pairs: int, pairs_per_step: int, epochs: int, seed: int) -> np.ndarray:
    """Row numbers in the order of training, [epochs, steps per epoch x pairs_per_step].

    Every epoch is an own permutation. Its last step is filled up with the first rows of the same permutation, so that every step has
    the same number of pairs, whatever the number of processes: some pairs count twice in an epoch, none is left out.
    """
    length = -(-pairs // pairs_per_step) * pairs_per_step
    orders = [np.random.default_rng(stable_seed(seed, "alignment order", epoch)).permutation(pairs) for epoch in range(epochs)]
    return np.stack([np.resize(order, length) for order in orders])


def _id_columns(table: pa.Table, path: Path) -> list[list[list[int]]]:
    for name in IDS:
        if name not in table.column_names:
            raise InputError(
                str(path), f"the column {name} is missing beside {IDS[0]}", "Give all three id columns, or none and the texts alone"
            )
        kind = table.schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
            raise InputError(f"{path}, column {name}", f"its type is {kind}", "It must be a list of integers")
    return [table[name].to_pylist() for name in IDS]


def _tokenized(table: pa.Table, path: Path, tokenizer: PreTrainedTokenizerBase | None) -> list[list[list[int]]]:
    missing = [name for name in TEXTS if name not in table.column_names]
    if missing:
        raise InputError(
            str(path),
            f"columns are missing: {', '.join(missing)}",
            f"A file of pairs has {', '.join(TEXTS)} and, if known, {', '.join(IDS)}",
        )
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise InputError(str(path), "it has no token ids, and the model has no tokenizer with an end token", f"Add {', '.join(IDS)}")
    columns = []
    for name in TEXTS:
        texts = table[name].to_pylist()
        if not all(isinstance(text, str) for text in texts):
            row = next(i for i, text in enumerate(texts) if not isinstance(text, str))
            raise InputError(f"{path}, row {row}", f"{name} is {texts[row]!r}", "It must be a text")
        ids = tokenizer(texts, add_special_tokens=name == "prompt")["input_ids"] if texts else []
        columns.append(ids if name == "prompt" else [[*row, tokenizer.eos_token_id] if row else row for row in ids])
    return columns


def _check(path: Path, row: int, ids: tuple[list[int] | None, ...], vocabulary: int) -> None:
    for name, values in zip(IDS, ids, strict=True):
        if values is None or None in values:
            raise InputError(f"{path}, row {row}", f"{name} has a null", "Leave such pairs out of the file")
        if values and not 0 <= min(values) <= max(values) < vocabulary:
            raise InputError(
                f"{path}, row {row}", f"{name} has ids outside 0..{vocabulary - 1}", "Sample and align with the same model and tokenizer"
            )


def _unusable(pair: Pair, max_tokens: int) -> str | None:
    if not (pair.prompt and pair.chosen and pair.rejected):
        return "empty"
    if pair.chosen == pair.rejected:  # no gradient, and a false log 2 in the average
        return "identical"
    return "too_long" if pair.tokens > max_tokens else None
