"""What a method that samples as it trains must be given: how to sample, and a reward."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpo4rec.errors import InputError
from dpo4rec.knowledge.config import Decoding

Reward = Callable[[list[str], list[str], list[bool]], list[float]]
"""Users, a text for each, and whether it was finished; returns the reward of each text. Texts of one user are compared with each other."""
PACKAGE = "dpo4rec."


@dataclass(frozen=True)
class Online:
    """How texts are drawn, and what judges them."""

    decoding: Decoding
    reward: Reward


def read_reward(worker: str, settings: Path) -> Reward:
    """The reward that a file names, for instance "dpo4rec.preference.online.OnlineReward".

    Args:
        worker: a class of this package with a method `read(settings)`: a job file can start no other code.
        settings: the JSON file that it is made of.

    Raises:
        InputError: there is no such class, or it cannot read its settings.
    """
    module, _, name = worker.rpartition(".")
    try:
        if not module.startswith(PACKAGE):
            raise ImportError(f"it is not of {PACKAGE}*")
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"reward {worker!r}", f"it cannot be loaded ({error})", "Run the stage that writes alignment.json again"
        ) from error
    return found.read(settings)
