"""The order of training: which comparisons make a step, and how a step is cut into forward passes of equal size."""

from collections.abc import Callable, Sequence

import numpy as np

from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.pairs import Preferences
from dpo4rec.files import stable_seed

Bin = list[int]
"""Comparisons of one forward pass of one process."""


def training_steps(preferences: Preferences, config: AlignmentConfig, seed: int) -> list[list[Bin]]:
    """The bins of every step of a run.

    Of the first epoch, the longest step comes first: if memory is too small, it shows then. Which comparisons make which step does not
    depend on how steps are cut.
    """
    prompts = [preferences.prompt_of(row) for row in range(len(preferences.comparisons))]
    order = schedule(prompts, config.pairs_per_step, config.epochs, seed).reshape(-1, config.pairs_per_step)

    def tokens(rows: Bin) -> int:
        return bin_tokens(preferences, rows, config.packing != "none")

    steps = cut(order.tolist(), prompts, tokens, config.tokens_per_batch, config.workers)
    return longest_first(steps, [bin_tokens(preferences, step, packed=True) for step in order.tolist()], config.epochs)


def longest_first(steps: list[list[Bin]], tokens: list[int], epochs: int) -> list[list[Bin]]:
    """The steps, with the one of the first epoch that has most tokens before all others."""
    longest = max(range(len(steps) // epochs), key=lambda step: tokens[step])
    return [steps[longest], *steps[:longest], *steps[longest + 1 :]]


def bin_tokens(preferences: Preferences, rows: Bin, packed: bool) -> int:
    """Tokens that a bin takes: without padding and every prompt once, or in padded rows."""
    answers = {answer for row in rows for answer in (preferences.comparisons[row].chosen, *preferences.comparisons[row].rejected)}
    prompts = {preferences.answers[answer][0] for answer in answers}
    lengths = [len(preferences.answers[answer][1]) for answer in answers]
    if packed:
        return sum(lengths) + sum(len(preferences.prompts[prompt]) for prompt in prompts)
    return len(answers) * max(len(preferences.prompts[preferences.answers[a][0]]) + len(preferences.answers[a][1]) for a in answers)


def longest_text(preferences: Preferences) -> int:
    """Tokens of the longest prompt with an answer."""
    return max(len(preferences.prompts[prompt]) + len(answer) for prompt, answer in preferences.answers)


def schedule(prompts: Sequence[int], per_step: int, epochs: int, seed: int) -> np.ndarray:
    """Comparisons in the order of training, [epochs, steps per epoch x per_step].

    Every epoch is an own permutation of the prompts; comparisons of one prompt stand together, so that they can share it. The last step is
    filled up with the first comparisons of the same epoch: every step has the same number, whatever the number of processes; some count
    twice in an epoch, none is left out.

    Args:
        prompts: of each comparison, the number of its prompt; numbers without holes.
    """
    length = -(-len(prompts) // per_step) * per_step
    orders = []
    for epoch in range(epochs):
        permutation = np.random.default_rng(stable_seed(seed, "alignment order", epoch)).permutation(max(prompts) + 1)
        orders.append(np.argsort(np.argsort(permutation)[np.asarray(prompts)], kind="stable"))
    return np.stack([np.resize(order, length) for order in orders])


def cut(steps: Sequence[Bin], prompts: Sequence[int], tokens: Callable[[Bin], int], budget: int, workers: int) -> list[list[Bin]]:
    """Cuts every step into the same number of bins, a multiple of `workers`: as few as keep each within the budget of tokens.

    The bins of a step are about equal, the longest first. A bin is over the budget only where one comparison alone is.

    Args:
        steps: the comparisons of each step.
        prompts: as of `schedule`.
        tokens: what a bin takes.
    """
    units = [_units(step, prompts, tokens, budget) for step in steps]
    most = min(map(len, steps)) // workers * workers
    bins = min(most, workers * -(-max(map(tokens, steps)) // (budget * workers)))
    while True:
        dealt = [_deal(step, tokens, bins) for step in units]
        fits = all(len(bin_) == 1 or tokens(bin_) <= budget for step in dealt for bin_ in step)
        if fits or bins == most:
            return dealt
        bins += workers


def _units(step: Bin, prompts: Sequence[int], tokens: Callable[[Bin], int], budget: int) -> list[Bin]:
    """Comparisons that share a prompt, in halves where they are over the budget together."""
    groups: dict[int, Bin] = {}
    for row in step:
        groups.setdefault(prompts[row], []).append(row)
    units, left = [], list(groups.values())
    while left:
        unit = left.pop()
        if len(unit) > 1 and tokens(unit) > budget:
            left += _halves(unit)
        else:
            units.append(unit)
    return units[::-1]


def _deal(units: list[Bin], tokens: Callable[[Bin], int], bins: int) -> list[Bin]:
    """Longest first, each to the emptiest bin; units are cut further only where there are fewer of them than bins."""
    units = list(units)
    while len(units) < bins:
        largest = max(units, key=len)
        units.remove(largest)
        units += _halves(largest)
    dealt: list[Bin] = [[] for _ in range(bins)]
    loads = [0] * bins
    for size, unit in sorted(((tokens(unit), unit) for unit in units), key=lambda pair: -pair[0]):
        emptiest = loads.index(min(loads))
        dealt[emptiest] += unit
        loads[emptiest] += size
    return [bin_ for _, bin_ in sorted(zip(loads, dealt, strict=True), key=lambda pair: -pair[0])]


def _halves(unit: Bin) -> list[Bin]:
    return [unit[: len(unit) // 2], unit[len(unit) // 2 :]]
