"""A forward pass: comparisons as tensors, packed or padded.

Shapes: B comparisons, K rejected answers each at most, A distinct answers, T tokens packed into one row, L positions of a padded row,
N completion tokens of all answers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from dpo4rec.alignment.pairs import Ids, Preferences
from dpo4rec.alignment.schedule import Bin

Batch = dict[str, Any]
Spans = tuple[tuple[int, tuple[int, ...]], ...]
"""A packed row: for each prompt, its length and the lengths of its answers."""


class ScheduledBins(Dataset[Bin]):
    """The bins in the order of training."""

    def __init__(self, bins: list[Bin]) -> None:
        self.bins = bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, place: int) -> Bin:
        return self.bins[place]


@dataclass(frozen=True)
class Collator:
    """Makes a batch of one bin.

    Every batch has `index` [B] (comparison numbers), `answers` [A] (answer numbers), `lengths` [A], `chosen` [B] and `rejected` [B, K]
    (places in `answers`, -1 where there is none), and `tokens` (a number: computed without padding). All tensors are integers: a DeepSpeed
    bf16 configuration would round every float input (the log-probabilities of the reference, for one).

    A packed batch has `input_ids` [1, T] and `position_ids` [1, T], a prompt once and then its answers, each counted on from the prompt's
    end; `spans`; and for each of the N tokens `predictors` (the place before it: for an answer's first token the prompt's last), `targets`
    and `owners` (places in `answers`). Example: prompt (5 6), answers (7 2) and (8 9 2): input_ids [[5 6 7 2 8 9 2]], position_ids
    [[0 1 2 3 2 3 4]], spans ((2, (2, 3)),), predictors [1 2 1 4 5], targets [7 2 8 9 2], owners [0 0 1 1 1].

    A padded batch has a row for each answer: `input_ids`, `attention_mask` and `completion_mask` (1 on the answer), each [A, L].
    """

    preferences: Preferences
    packed: bool
    multiple: int = 1
    """A packed row is filled up to a multiple of this (FlexAttention works on blocks of 128)."""

    def __call__(self, bins: list[Bin]) -> Batch:
        (rows,) = bins
        data = self.preferences
        comparisons = [data.comparisons[row] for row in rows]
        by_prompt: dict[int, dict[int, None]] = {}
        for one in comparisons:
            by_prompt.setdefault(data.answers[one.chosen][0], {}).update(dict.fromkeys((one.chosen, *one.rejected)))
        answers = [answer for group in by_prompt.values() for answer in group]
        place = {answer: at for at, answer in enumerate(answers)}
        width = max(len(one.rejected) for one in comparisons)
        rejected = [[place[bad] for bad in one.rejected] + [-1] * (width - len(one.rejected)) for one in comparisons]
        batch = {
            "index": torch.tensor(rows),
            "answers": torch.tensor(answers),
            "lengths": torch.tensor([len(data.answers[answer][1]) for answer in answers]),
            "chosen": torch.tensor([place[one.chosen] for one in comparisons]),
            "rejected": torch.tensor(rejected),
        }
        texts = [(data.prompts[prompt], [data.answers[answer][1] for answer in group]) for prompt, group in by_prompt.items()]
        return batch | (packed(texts, self.multiple) if self.packed else padded(texts))


def packed(prompts: list[tuple[Ids, list[Ids]]], multiple: int) -> Batch:
    """One row of all prompts and answers, see `Collator`; filled up to a multiple with tokens that see only themselves."""
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for prompt, answers in prompts:
        last = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        for answer in answers:
            predictors += [last, *range(len(ids), len(ids) + len(answer) - 1)]
            owners += [owners[-1] + 1 if owners else 0] * len(answer)
            targets += answer
            ids += answer
            positions += range(len(prompt), len(prompt) + len(answer))
    tokens, fill = len(ids), -len(ids) % multiple
    rest = ((fill, ()),) if fill else ()
    return {
        "input_ids": torch.tensor([ids + [0] * fill]),
        "position_ids": torch.tensor([positions + list(range(fill))]),
        "spans": (*((len(prompt), tuple(map(len, answers))) for prompt, answers in prompts), *rest),
        "predictors": torch.tensor(predictors),
        "targets": torch.tensor(targets),
        "owners": torch.tensor(owners),
        "tokens": tokens,
    }


def padded(prompts: list[tuple[Ids, list[Ids]]]) -> Batch:
    """A row for each answer, filled up on the right to the longest, see `Collator`."""
    texts = [(prompt, answer) for prompt, answers in prompts for answer in answers]
    shape = len(texts), max(len(prompt) + len(answer) for prompt, answer in texts)
    names = ("input_ids", "attention_mask", "completion_mask")
    batch: Batch = {name: torch.zeros(shape, dtype=torch.long) for name in names}
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        batch["input_ids"][row, :end] = torch.tensor(prompt + answer)
        batch["attention_mask"][row, :end] = 1
        batch["completion_mask"][row, len(prompt) : end] = 1
    return batch | {"tokens": sum(len(prompt) + len(answer) for prompt, answer in texts)}
