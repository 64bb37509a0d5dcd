"""What the shown part of a history says about a user: the truth that claims are checked against."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo4rec.data.schema import era
from dpo4rec.knowledge.claims import Claim


@dataclass(frozen=True)
class Item:
    """An item as prompts and claims see it; its names are cleaned lines."""

    title: str
    genres: tuple[str, ...]
    era: str | None
    people: tuple[str, ...]


class Catalogue:
    """Items by id, the names that claims may use, and how common each genre and era is in the training users' histories."""

    def __init__(self, items: pa.Table, histories: Iterable[list[str]], rated: bool = True) -> None:
        """`histories` are gone through once; `rated` is whether prompts have ratings to tell."""
        self.rated = rated
        self.items = {
            row["item_id"]: Item(
                clean(row["title"]), _cleaned(row["genres"]), era(row["year"]) if row["year"] else None, _cleaned(row["people"])
            )
            for row in items.to_pylist()
        }
        seen = Counter(item_id for history in histories for item_id in history)
        genre_counts, era_counts = Counter[str](), Counter[str]()
        for item_id, count in seen.items():
            item = self.items[item_id]
            genre_counts.update({genre: count * times for genre, times in Counter(item.genres).items()})
            era_counts.update({item.era: count} if item.era else {})
        self.genre_share, self.era_share = _shares(genre_counts, seen.total()), _shares(era_counts, seen.total())
        everything = self.items.values()
        genres = {genre for item in everything for genre in item.genres}
        self.names: dict[str, set[str]] = {
            "liked_genre": genres,
            "avoided_genre": genres,
            "era": {item.era for item in everything if item.era},
            "person": {person for item in everything for person in item.people},
            "title": {item.title for item in everything},
        }


MARK = re.compile(r"<(?=[|｜/a-zA-Z<])|\[(?=/?[A-Z]+(?:_[A-Z]+)*\])")
"""What begins a control token of a chat template: <|im_end|>, </s>, <start_of_turn>, <<SYS>>, <｜User｜>, [INST], [/INST], [TOOL_CALLS]."""


def clean(text: str, longest: int = 80) -> str:
    """Text from data as one line of a prompt: white space joined, control characters dropped, special-token marks broken, cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = MARK.sub(r"\g<0> ", line)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _cleaned(names: list[str]) -> tuple[str, ...]:
    return tuple(filter(None, map(clean, names)))


def facts(catalogue: Catalogue, item_ids: list[str], ratings: list[float], like_threshold: float) -> list[Claim]:
    """True claims, the strongest of each kind first, titles in the order in which they are shown.

    A genre or era is liked (avoided) when it is found more (less) often among the liked (shown) items than the training users'
    histories have it; strength is the z-score of the count against that share, as of a binomial.
    """
    shown = [catalogue.items[item_id] for item_id in item_ids]
    liked = [item for item, rating in zip(shown, ratings, strict=True) if rating > like_threshold]
    counted = liked or shown
    genres = _z_scores(Counter(genre for item in counted for genre in item.genres), catalogue.genre_share, len(counted))
    against = _z_scores(Counter(genre for item in shown for genre in item.genres), catalogue.genre_share, len(shown))
    eras = _z_scores(Counter(item.era for item in counted if item.era), catalogue.era_share, len(counted))
    people = Counter(person for item in liked for person in item.people)
    claims = [Claim("liked_genre", name) for name, z in _top(genres, 3) if z > 0]
    positive = {claim.name for claim in claims}
    lowest = _top({name: -z for name, z in against.items() if name not in positive}, 2)
    claims += [Claim("avoided_genre", name) for name, z in lowest if z > 0]
    claims += [Claim("era", name) for name, z in _top(eras, 2) if z > 0]
    claims += [Claim("person", name) for name, _ in _top(people, 3)]
    return claims + [Claim("title", title) for title in dict.fromkeys(item.title for item in liked)]


def _shares(counts: Counter[str], items: int) -> dict[str, float]:
    return {name: count / items for name, count in sorted(counts.items())}


def _z_scores(counts: Counter[str], shares: dict[str, float], items: int) -> dict[str, float]:
    return {name: (counts[name] - items * p) / np.sqrt(items * p * (1 - p) + 0.5) for name, p in shares.items()}


def _top(scores: dict[str, float] | Counter[str], count: int) -> list[tuple[str, float]]:
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:count]
