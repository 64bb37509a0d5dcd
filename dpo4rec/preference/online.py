"""The recommender's feedback on texts that are sampled while the policy is trained: the same judge as the score stage's."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo4rec.files import read_json, write_json
from dpo4rec.knowledge.encoders import Encoder, EncoderWorkerConfig
from dpo4rec.knowledge.form import Form
from dpo4rec.preference.reward import Scorer, ScorerConfig
from dpo4rec.settings import Settings


class OnlineRewardConfig(Settings):
    """What judges a text: its form, the encoder, and the recommenders that have not seen its user."""

    scorer: ScorerConfig
    encoder: EncoderWorkerConfig
    format_gate: bool
    names: dict[str, list[str]] | None
    """For the built-in model, the names that claims may use, see `Form`."""


class OnlineReward:
    """The raw reward of each text: users, texts and whether each is finished in, rewards out.

    With the format gate a text out of form falls below all well-formed texts of its user, as far below the worst of them as that is below
    the best (by 1 where they are all the same), so that the gate weighs as much as the reward whatever the reward's scale. A user without
    any well-formed text has rewards of 0.
    """

    def __init__(self, config: OnlineRewardConfig) -> None:
        self.gate = config.format_gate
        self.form = Form({kind: set(names) for kind, names in config.names.items()} if config.names is not None else None)
        self.encode, self.score = Encoder(config.encoder), Scorer(config.scorer)

    def __call__(self, users: list[str], texts: list[str], finished: list[bool]) -> list[float]:
        judged = [row for row, text in enumerate(texts) if not self.gate or self.form(text, finished[row])]
        if not judged:
            return [0.0] * len(texts)
        table = pa.table({"user_id": [users[row] for row in judged], "sample": judged, "text": [texts[row] for row in judged]})
        rewards = dict(zip(judged, self.score(self.encode(table))["reward"].to_pylist(), strict=True))
        of_user: dict[str, list[float]] = {}
        for row, reward in rewards.items():
            of_user.setdefault(users[row], []).append(reward)
        return [rewards[row] if row in rewards else below(of_user.get(user)) for row, user in enumerate(users)]

    @classmethod
    def read(cls, path: Path) -> "OnlineReward":
        """From the file that `write_settings` wrote; the run folder may have been moved since.

        Raises:
            InputError: the file, or one that it names, is missing or damaged.
        """
        return cls(OnlineRewardConfig.model_validate(_moved(read_json(path), ABOVE, str(path.resolve().parents[1]))))


ABOVE = "<run folder>"
"""Stands for the folder above the file's; no path of the user's begins so, as one may with ".."."""


def below(rewards: list[float] | None) -> float:
    """The reward of a text out of form, given those of the user's well-formed texts."""
    if not rewards:
        return 0.0
    least, most = min(rewards), max(rewards)
    return least - ((most - least) or 1.0)


def write_settings(config: OnlineRewardConfig, path: Path) -> None:
    """Writes what `OnlineReward.read` reads; files of the folder above the file's are named relative to it."""
    write_json(_moved(config.model_dump(mode="json"), str(path.resolve().parents[1]), ABOVE), path)


def _moved(value: Any, old: str, new: str) -> Any:
    """`value` with every path below the folder `old` now below `new`."""
    if isinstance(value, str):
        return new + value[len(old) :] if value.startswith(old + os.sep) else value
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    return [_moved(item, old, new) for item in value] if isinstance(value, list) else value
