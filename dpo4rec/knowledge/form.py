"""The format gate: is a text one that the recommender's encoder was meant for?"""

from dpo4rec.knowledge.claims import parse, well_formed


class Form:
    """Decides whether a text is well-formed.

    Args:
        names: for the built-in model, the names that claims of each kind may use: a text must be claims and nothing else.
            None for other models, whose texts must only be finished and not empty.
    """

    def __init__(self, names: dict[str, set[str]] | None) -> None:
        self.names = names

    def __call__(self, text: str, finished: bool) -> bool:
        if not finished or not text.strip():
            return False
        return self.names is None or well_formed(text, self.names)


def grounded_share(text: str, true: set[str]) -> float | None:
    """Share of a text's claims that are among the true ones (both written out, as `str(claim)`); None when it does not parse."""
    claims = parse(text)
    return None if not claims else sum(str(claim) in true for claim in claims) / len(claims)
