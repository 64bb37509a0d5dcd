"""Preference texts as lists of claims: "Enjoys Comedy. Avoids Horror. Prefers the 1990s. Follows Ann Lee. Loved Heat."

The built-in tiny model writes in this small language, so its texts can be checked claim by claim.
"""

import re
from dataclasses import dataclass

OPENINGS = {
    "liked_genre": "Enjoys",
    "avoided_genre": "Avoids",
    "era": "Prefers the",
    "person": "Follows",
    "title": "Loved",
}
_KINDS = {opening: kind for kind, opening in OPENINGS.items()}
_BOUNDARY = re.compile(r"(?<=\.) (?=(?:" + "|".join(OPENINGS.values()) + r") )")
_SENTENCE = re.compile(r"(" + "|".join(OPENINGS.values()) + r") (.+)\.")


@dataclass(frozen=True)
class Claim:
    """One statement about a user, for example `Claim("liked_genre", "Comedy")`."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{OPENINGS[self.kind]} {self.name}."


def render(claims: list[Claim]) -> str:
    return " ".join(map(str, claims))


def parse(text: str) -> list[Claim] | None:
    """The claims of a text, or None when any sentence is not of the form `<opening> <name>.`"""
    claims = []
    for sentence in _BOUNDARY.split(text.strip()):
        match = _SENTENCE.fullmatch(sentence)
        if match is None:
            return None
        claims.append(Claim(_KINDS[match[1]], match[2]))
    return claims


def well_formed(text: str, names: dict[str, set[str]]) -> bool:
    """True when the text parses, repeats no claim, and every name exists among `names[kind]`."""
    claims = parse(text) or []
    return bool(claims) and len(set(claims)) == len(claims) and all(claim.name in names[claim.kind] for claim in claims)
