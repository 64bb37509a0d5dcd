"""Settings of reward and pairs."""

from typing import Literal

from pydantic import Field, PositiveInt

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


class PairConfig(Settings):
    """How scored texts become preference pairs."""

    pairs_per_user: PositiveInt = 1
    """1: best against worst; m: also second best against second worst, and so on."""
    keep_share: float = Field(default=1.0, gt=0, le=1)
    """Keep the pairs with the largest gap in reward, this share of them."""
    format_gate: bool = True
    """A text that is not well-formed is never chosen, and the user's best such text is rejected in a pair of its own."""
    orientation: Literal["reward", "random"] = "reward"
    """random is the control: the same pairs, each turned by a coin."""
