"""The noisy rule-based writer: the teacher of the built-in tiny model.

It states true facts mixed with spurious claims and has habits as a language model has: it is brief, it likes to dwell on titles.
Neither is what a recommender needs most, so samples differ in use, and feedback has something to teach.
"""

from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from dpo4rec.knowledge.claims import OPENINGS, Claim, render
from dpo4rec.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class WriterConfig(Settings):
    """Habits of the writer."""

    spurious_share: Share = 0.25
    """Share of claims whose name is drawn at random from the whole catalogue."""
    length_weights: list[float] = [0.1, 0.3, 0.25, 0.2, 0.1, 0.05]
    """Weight of writing 1, 2, 3, ... claims."""
    kind_weights: dict[str, float] = {"liked_genre": 0.3, "avoided_genre": 0.2, "era": 0.2, "person": 0.15, "title": 0.15}

    @model_validator(mode="after")
    def _kinds_exist(self) -> "WriterConfig":
        if unknown := set(self.kind_weights) - set(OPENINGS):
            raise ValueError(f"unknown kinds of claim {sorted(unknown)}; known: {sorted(OPENINGS)}")
        return self


class Writer:
    """Composes texts.

    Args:
        config: habits.
        names: the names of each kind that exist, for spurious claims.
    """

    def __init__(self, config: WriterConfig, names: dict[str, set[str]]) -> None:
        self.config = config
        self.names = {kind: sorted(names[kind]) for kind in config.kind_weights if names[kind]}
        weights = np.array([config.kind_weights[kind] for kind in self.names])
        self.kinds, self.kind_shares = list(self.names), weights / weights.sum()
        lengths = np.array(config.length_weights)
        self.length_shares = lengths / lengths.sum()

    def write(self, facts: list[Claim], rng: np.random.Generator) -> str:
        """One text from a user's true claims (strongest of each kind first); no claim is made twice."""
        true: dict[str, list[Claim]] = {kind: [claim for claim in facts if claim.kind == kind] for kind in self.kinds}
        claims: list[Claim] = []
        wanted = 1 + rng.choice(len(self.length_shares), p=self.length_shares)
        for _ in range(3 * wanted):  # a draw may repeat a claim; a few more draws make up for it
            kind = self.kinds[rng.choice(len(self.kinds), p=self.kind_shares)]
            rest = [claim for claim in true[kind] if claim not in claims]
            if rng.random() < self.config.spurious_share or not rest:
                claim = Claim(kind, self.names[kind][rng.integers(len(self.names[kind]))])
            else:
                claim = rest[min(int(rng.exponential(0.7)), len(rest) - 1)]  # mostly the strongest
            if claim not in claims:
                claims.append(claim)
            if len(claims) == wanted:
                break
        # in a fixed order, so that a small model can tell what it has said already
        return render(sorted(claims, key=lambda claim: (self.kinds.index(claim.kind), claim.name)))
