"""The noisy rule-based writer: the teacher of the built-in tiny model.

It states true facts mixed with spurious claims and has habits as a language model has: how much it says, and of what kind. Not every habit
is what a recommender needs, so samples differ in use, and feedback has something to teach.
"""

import numpy as np

from dpo4rec.errors import InputError
from dpo4rec.knowledge.claims import Claim, render
from dpo4rec.knowledge.config import WriterConfig


class Writer:
    """Composes texts.

    Args:
        config: habits.
        names: the names of each kind that exist, for spurious claims.

    Raises:
        InputError: there are no names of the kinds that it speaks of.
    """

    def __init__(self, config: WriterConfig, names: dict[str, set[str]]) -> None:
        self.config = config
        self.names = {kind: sorted(names[kind]) for kind in config.kind_weights if names[kind]}
        if not self.names:
            cause = f"a writer speaks of {', '.join(config.kind_weights)}, of which the items have none"
            raise InputError("llm.tiny.writers", cause, "Give it kind_weights of what they have: title, or genres, years or people")
        weights = np.array([config.kind_weights[kind] for kind in self.names])
        self.kinds, self.kind_shares = list(self.names), weights / weights.sum()
        lengths = np.array(config.length_weights)
        self.length_shares = lengths / lengths.sum()

    def write(self, facts: list[Claim], rng: np.random.Generator) -> str:
        """One text from a user's true claims (as `facts` orders them); no claim is made twice."""
        true: dict[str, list[Claim]] = {kind: [claim for claim in facts if claim.kind == kind] for kind in self.kinds}
        claims: list[Claim] = []
        wanted = 1 + rng.choice(len(self.length_shares), p=self.length_shares)
        # titles in a row: what comes next is for the prompt to say, which is how a small model learns to look there
        del true.get("title", [])[: rng.integers(max(0, len(true.get("title", [])) - wanted) + 1)]
        for _ in range(3 * wanted):  # a draw may repeat a claim or find none that is true; a few more draws make up for it
            kind = self.kinds[rng.choice(len(self.kinds), p=self.kind_shares)]
            rest = [claim for claim in true[kind] if claim not in claims]
            if not rest:
                continue
            strongest = 0 if kind == "title" else int(rng.exponential(0.7))
            spurious = rng.random() < self.config.spurious_share
            claim = self._invented(kind, rng) if spurious else rest[min(strongest, len(rest) - 1)]
            if claim not in claims:
                claims.append(claim)
            if len(claims) == wanted:
                break
        claims = claims or [self._invented(self.kinds[0], rng)]
        # in a fixed order, so that a small model can tell what it has said already
        names = sorted(claim.name for claim in claims)
        shown = {claim: place for place, claim in enumerate(facts)}
        ends = len(facts)
        places = {c: shown.get(c, rng.uniform(0, ends)) if c.kind == "title" else names.index(c.name) for c in claims}
        return render(sorted(claims, key=lambda claim: (self.kinds.index(claim.kind), places[claim])))

    def _invented(self, kind: str, rng: np.random.Generator) -> Claim:
        return Claim(kind, self.names[kind][rng.integers(len(self.names[kind]))])
