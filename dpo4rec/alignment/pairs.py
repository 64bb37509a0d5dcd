"""Preference pairs from Parquet: prompts, their answers, and which answer is to beat which."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dpo4rec.alignment.config import AGAINST_ALL, AlignmentConfig
from dpo4rec.errors import InputError
from dpo4rec.files import read_parquet

TEXTS = ("prompt", "chosen", "rejected")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """An answer that is to beat others of the same prompt, by their numbers in `Preferences.answers`."""

    chosen: int
    rejected: tuple[int, ...]
    epsilon: float
    """Probability that it is the wrong way round; 0 unless the noise model says otherwise."""
    margin: float
    """By how much the chosen answer must win, for objectives that have a margin."""


@dataclass(frozen=True)
class Preferences:
    """The data of a run, every text once: `answers` are (prompt number, token ids), ending with the end token if it was sampled."""

    prompts: list[Ids]
    answers: list[tuple[int, Ids]]
    comparisons: list[Comparison]

    def prompt_of(self, row: int) -> int:
        """Number of the prompt of comparison `row`."""
        return self.answers[self.comparisons[row].chosen][0]


def read_preferences(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, max_tokens: int, config: AlignmentConfig
) -> tuple[Preferences, dict[str, int]]:
    """Reads the pairs that can be trained on, and counts the others by reason: "empty", "identical", "too_long".

    A row is a pair. Rows may share a prompt; the objectives "softmax" and "dmpo" set the chosen text of a row against the rejected texts
    of all rows with the same prompt and chosen text. The columns `prompt_ids`, `chosen_ids`, `rejected_ids` are used as they are. A file
    without them (one made for TRL) has its `prompt`, `chosen` and `rejected` tokenised apart, with the end token after both completions.
    The noise models "epsilon_column" and "margin_column" read the column `epsilon` or `margin`.

    Args:
        tokenizer: used only for a file without ids.
        vocabulary: ids must be below this number.
        max_tokens: longest prompt + completion.
        config: says how noise is modelled and whether rows are set together.

    Raises:
        InputError: the file is missing, damaged or lacks columns; a row is null or has an id or a number out of range; no pair is left.
    """
    table = read_parquet(path)
    columns = id_columns(table, path, IDS) if IDS[0] in table.column_names else _tokenized(table, path, tokenizer)
    epsilons, margins = _numbers(table, path, config)
    building, dropped = _Building(together=config.objective in AGAINST_ALL), Counter[str]()
    for row, ids in enumerate(zip(*columns, strict=True)):
        check_ids(path, row, ids, vocabulary, IDS)
        prompt, chosen, rejected = (tuple(values) for values in ids)
        reason = _unusable(prompt, chosen, rejected, max_tokens)
        if reason:
            dropped[reason] += 1
        else:
            building.add(prompt, chosen, rejected, epsilons[row], margins[row])
    if not building.rows:
        raise InputError(
            str(path), f"no pair is left to train on (dropped: {dict(dropped) or 'none, the file is empty'})", "Look at how it was made"
        )
    return building.done(), dict(sorted(dropped.items()))


class _Building:
    """Gives each distinct text a number."""

    def __init__(self, together: bool) -> None:
        self.together = together
        self.prompts: dict[Ids, int] = {}
        self.answers: dict[tuple[int, Ids], int] = {}
        self.rows: dict[Any, tuple[int, list[int], float, float]] = {}

    def add(self, prompt: Ids, chosen: Ids, rejected: Ids, epsilon: float, margin: float) -> None:
        at = self.prompts.setdefault(prompt, len(self.prompts))
        good, bad = (self.answers.setdefault((at, ids), len(self.answers)) for ids in (chosen, rejected))
        beaten = self.rows.setdefault(good if self.together else len(self.rows), (good, [], epsilon, margin))[1]
        if bad not in beaten:
            beaten.append(bad)

    def done(self) -> Preferences:
        comparisons = [Comparison(good, tuple(bad), epsilon, margin) for good, bad, epsilon, margin in self.rows.values()]
        return Preferences(list(self.prompts), list(self.answers), comparisons)


def _numbers(table: pa.Table, path: Path, config: AlignmentConfig) -> tuple[list[float], list[float]]:
    """Epsilon and margin of each row."""
    rows = table.num_rows
    epsilon = config.epsilon if config.noise == "epsilon" else 0.0
    if config.noise == "epsilon_column":
        return _number_column(table, path, "epsilon", 0.0, 0.5), [config.margin] * rows
    if config.noise == "margin_column":
        return [epsilon] * rows, _number_column(table, path, "margin", -math.inf, math.inf)
    return [epsilon] * rows, [config.margin] * rows


def _number_column(table: pa.Table, path: Path, name: str, least: float, below: float) -> list[float]:
    if name not in table.column_names:
        raise InputError(str(path), f"alignment.noise is {name}_column, but the column {name} is missing", "Add it, or change the noise")
    values = table[name].to_pylist()
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value < below:
            raise InputError(f"{path}, row {row}", f"{name} is {value!r}", f"It must be a finite number in [{least:g}, {below:g})")
    return [float(value) for value in values]


def id_columns(table: pa.Table, path: Path, names: tuple[str, ...]) -> list[list[list[int]]]:
    """The columns of token ids.

    Raises:
        InputError: one is missing or does not hold lists of integers.
    """
    for name in names:
        if name not in table.column_names:
            raise InputError(str(path), f"the column {name} is missing", f"The columns of token ids are {', '.join(names)}")
        kind = table.schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
            raise InputError(f"{path}, column {name}", f"its type is {kind}", "It must be a list of integers")
    return [table[name].to_pylist() for name in names]


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


def check_ids(path: Path, row: int, ids: tuple[list[int] | None, ...], vocabulary: int, names: tuple[str, ...]) -> None:
    """Raises `InputError` where a row has a null or an id outside the vocabulary."""
    for name, values in zip(names, ids, strict=True):
        if values is None or None in values:
            raise InputError(f"{path}, row {row}", f"{name} has a null", "Leave such rows out of the file")
        if values and not 0 <= min(values) <= max(values) < vocabulary:
            raise InputError(
                f"{path}, row {row}", f"{name} has ids outside 0..{vocabulary - 1}", "Sample and align with the same model and tokenizer"
            )


def _unusable(prompt: Ids, chosen: Ids, rejected: Ids, max_tokens: int) -> str | None:
    if not (prompt and chosen and rejected):
        return "empty"
    if chosen == rejected:  # no gradient, and a false log 2 in the average
        return "identical"
    return "too_long" if len(prompt) + max(len(chosen), len(rejected)) > max_tokens else None
