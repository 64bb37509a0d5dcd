"""What the evaluation of a run compares: who ranks the test users' lists, by which texts, and which pairs of these are tested."""

from dataclasses import dataclass

POLICIES = ("untuned", "tuned")


@dataclass(frozen=True)
class Judge:
    """A kind of recommender of the evaluation: what it personalises by, and on which policies' texts it was fitted."""

    user_signal: str
    item_text: bool
    policies: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """What it was fitted for: to judge the last policy, or what was there before."""
        return "tuned" if "tuned" in self.policies else "untuned"


JUDGES = {
    "none": Judge("none", False),
    "history": Judge("history", False),
    "history-item-text": Judge("history", True),
    "item-text": Judge("none", True),
    "untuned": Judge("text", True, ("untuned",)),
    "tuned": Judge("text", True, ("tuned",)),
    "shared": Judge("text", True, ("untuned", "tuned")),
    "history-untuned": Judge("history+text", True, ("untuned",)),
    "history-tuned": Judge("history+text", True, ("tuned",)),
}


@dataclass(frozen=True)
class Condition:
    """A row of the table: who ranks, with whose text."""

    label: str
    judge: str | None
    texts: str | None = None
    shuffled: bool = False


CONDITIONS = [
    Condition("random", None),
    Condition("popularity", None),
    Condition("none", "none"),
    Condition("history", "history"),
    Condition("item text only", "item-text"),
    Condition("history + item text", "history-item-text"),
    Condition("shuffled text", "untuned", "untuned", shuffled=True),
    Condition("untuned text", "untuned", "untuned"),
    Condition("tuned text", "tuned", "tuned"),
    Condition("untuned text, shared recommender", "shared", "untuned"),
    Condition("tuned text, shared recommender", "shared", "tuned"),
    Condition("history + untuned text", "history-untuned", "untuned"),
    Condition("history + tuned text", "history-tuned", "tuned"),
]

BEST_OF = "best of the untuned texts"
"""Label of what `evaluation.best_of` adds to the conditions."""

COMPARISONS = [
    ("tuned text", "untuned text"),
    ("tuned text, shared recommender", "untuned text, shared recommender"),
    ("history + tuned text", "history + untuned text"),
    ("untuned text", "none"),
    ("untuned text", "item text only"),
    ("tuned text", "none"),
    ("tuned text", "item text only"),
    ("untuned text", "shuffled text"),
    ("history + tuned text", "history + item text"),
]
