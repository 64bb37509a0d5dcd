"""Settings of reward and pairs."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from dpo4rec.settings import Settings


class RewardConfig(Settings):
    """How the recommender judges a text."""

    kind: Literal["log_likelihood", "ndcg", "map"] = "log_likelihood"
    """Mean over the user's lists of: the dense binary log-likelihood of the labels, NDCG@k, or average precision @k."""
    k: PositiveInt = 5
    folds: int = Field(default=2, ge=2)
    """Training users are cut into so many folds; a user is scored by recommenders that were trained without the user's fold."""
    seeds: PositiveInt = 2
    """Recommenders a fold, over which standardised rewards are averaged."""
    fit_users: PositiveInt | None = None
    """Training users on whose texts the reward's recommenders are fitted, drawn by the seed [all]. With a number sampling, encoding and
    scoring of the round's texts run at the same time, and the memory they take does not grow with the users."""

    @model_validator(mode="after")
    def _k_belongs(self) -> "RewardConfig":
        if self.kind == "log_likelihood" and self.k != type(self).model_fields["k"].default:
            raise ValueError("reward.k is for reward.kind=ndcg or map: the log-likelihood has no cut-off")
        return self


class PairConfig(Settings):
    """How scored texts become preference pairs."""

    pairs_per_user: PositiveInt = 1
    """1: best against worst; m: also second best against second worst, and so on."""
    keep_share: float = Field(default=1.0, gt=0, le=1)
    """Keep the pairs with the largest gap in reward, this share of them."""
    max_length_ratio: float | None = Field(default=None, ge=1)
    """Length control: leave out pairs whose longer text has more than so many times the tokens of the shorter one [any lengths]."""
    format_gate: bool = True
    """Pairs are of well-formed texts."""
    malformed_pair: bool = True
    """With the format gate, the user's best text that is not well-formed is rejected, too, in a pair of its own.

    That teaches form, and brevity where it is the long texts that miss it.
    """
    orientation: Literal["reward", "random", "length"] = "reward"
    """The others are controls, of the same pairs: each turned by a coin, or so that the text of more tokens is chosen."""

    @model_validator(mode="after")
    def _gate_has_two_sides(self) -> "PairConfig":
        if not self.format_gate and not self.malformed_pair:
            raise ValueError("pairs.malformed_pair is for pairs.format_gate=true: without the gate there is no such pair, leave it out")
        return self
