"""Scored answers from Parquet, and how much each is to be imitated."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.pairs import Ids, check_ids, id_columns
from dpo4rec.errors import InputError
from dpo4rec.files import read_parquet

IDS = ("prompt_ids", "completion_ids")
REWARD = "standardised"
"""The column of rewards: of each answer, standard deviations above the mean of its prompt's answers."""


@dataclass(frozen=True)
class Answers:
    """The data of a run, every text once: `answers` are (prompt number, token ids); the `weights` of a prompt's answers sum to 1."""

    prompts: list[Ids]
    answers: list[tuple[int, Ids]]
    weights: list[float]


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample from: whose it is, its text and its token ids."""

    user_id: str
    text: str
    ids: list[int]


def read_answers(path: Path, vocabulary: int, max_tokens: int, config: AlignmentConfig) -> tuple[Answers, dict[str, int]]:
    """Reads the answers that are to be imitated, with weights, and counts those that cannot be by reason: "empty", "too_long".

    A row is an answer: `prompt_ids`, `completion_ids` and `standardised`. Rows with the same tokens are one answer, with their weights
    added; answers of weight 0 are left out.

    Args:
        vocabulary: ids must be below this number.
        max_tokens: longest prompt + completion.
        config: says how rewards become weights.

    Raises:
        InputError: the file is missing, damaged or lacks columns; a row is null, has an id out of range or a reward that is no finite
            number; no answer is left.
    """
    table = read_parquet(path)
    rewards = _rewards(table, path)
    by_prompt: dict[Ids, list[tuple[Ids, float]]] = {}
    dropped = Counter[str]()
    for row, ids in enumerate(zip(*id_columns(table, path, IDS), strict=True)):
        check_ids(path, row, ids, vocabulary, IDS)
        prompt, answer = (tuple(values) for values in ids)
        if not prompt or not answer:
            dropped["empty"] += 1
        elif len(prompt) + len(answer) > max_tokens:
            dropped["too_long"] += 1
        else:
            by_prompt.setdefault(prompt, []).append((answer, rewards[row]))
    if not by_prompt:
        raise InputError(str(path), f"no answer is left to train on (dropped: {dict(dropped) or 'none, the file is empty'})", "Look at it")
    return _weighted(by_prompt, config), dict(sorted(dropped.items()))


def read_prompts(path: Path, vocabulary: int, max_prompt: int) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of a file of answers, one a user in the order of the file, and how many were dropped as "too_long".

    Args:
        max_prompt: longest prompt, in tokens.

    Raises:
        InputError: the file is missing, damaged or lacks `user_id`, `prompt` or `prompt_ids`; a row is null or has an id out of range; no
            prompt is left.
    """
    table = read_parquet(path)
    for name in ("user_id", "prompt"):
        if name not in table.column_names or table[name].null_count:
            raise InputError(str(path), f"the column {name} is missing or has nulls", "Run the stage that writes it again")
    found: dict[str, Prompt] = {}
    (columns,) = id_columns(table, path, IDS[:1])
    for row, (user, text, ids) in enumerate(zip(table["user_id"].to_pylist(), table["prompt"].to_pylist(), columns, strict=True)):
        check_ids(path, row, (ids,), vocabulary, IDS[:1])
        found.setdefault(user, Prompt(user, text, ids))
    kept = [prompt for prompt in found.values() if len(prompt.ids) <= max_prompt]
    if not kept:
        raise InputError(str(path), f"of {len(found)} prompts none leaves room for an answer", "Raise alignment.max_tokens")
    return kept, {"too_long": len(found) - len(kept)} if len(kept) < len(found) else {}


def imitation_weights(rewards: list[float], temperature: float | None) -> list[float]:
    """How much each of a prompt's answers is to be imitated; they sum to 1.

    softmax(reward / temperature): reward-weighted regression (Peters and Schaal 2007), which is the policy update of
    advantage-weighted regression (Peng et al. 2019, arXiv 1910.00177: exp(advantage / beta)) with the mean over the answers as the
    baseline and weights that sum to 1 in each prompt.

    Args:
        rewards: in standard deviations.
        temperature: None: the first of the best has it all (rejection sampling), which is the limit at 0.
    """
    best = max(rewards)
    if temperature is None:
        at = rewards.index(best)
        return [float(i == at) for i in range(len(rewards))]
    weights = [math.exp((reward - best) / temperature) for reward in rewards]
    return [weight / sum(weights) for weight in weights]


def _weighted(by_prompt: dict[Ids, list[tuple[Ids, float]]], config: AlignmentConfig) -> Answers:
    temperature = config.reward_temperature if config.method == "reward_weighted" else None
    weights: dict[tuple[int, Ids], float] = {}
    for number, answers in enumerate(by_prompt.values()):
        for (ids, _), weight in zip(answers, imitation_weights([reward for _, reward in answers], temperature), strict=True):
            if weight > 0:
                weights[number, ids] = weights.get((number, ids), 0.0) + weight
    return Answers(list(by_prompt), list(weights), list(weights.values()))


def _rewards(table: pa.Table, path: Path) -> list[float]:
    if REWARD not in table.column_names:
        raise InputError(str(path), f"the column {REWARD} is missing", f"A file of answers has {', '.join((*IDS, REWARD))}")
    values = table[REWARD].to_pylist()
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{path}, row {row}", f"{REWARD} is {value!r}", "It must be a finite number")
    return [float(value) for value in values]
