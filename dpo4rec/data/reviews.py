"""What the public review files have in common: interactions with repetitions, and a catalogue with gaps."""

import html
import re
from array import array
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo4rec.data.schema import INTERACTIONS, ITEMS, USERS, Tables, pair_codes
from dpo4rec.errors import InputError

TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


@dataclass(frozen=True)
class Description:
    """What a catalogue says of one item; a title of "" is none."""

    title: str
    genres: list[str] = field(default_factory=list)
    year: int | None = None
    people: list[str] = field(default_factory=list)


class Reviews:
    """Interactions gathered one by one, 20 bytes each; `items` holds the ids seen so far, in order."""

    def __init__(self) -> None:
        self.users: dict[str, int] = {}
        self.items: dict[str, int] = {}
        self._user_codes, self._item_codes, self._ratings, self._seconds = array("i"), array("i"), array("f"), array("q")

    def add(self, user: object, item: object, rating: float, seconds: int) -> None:
        """Raises `ValueError` when an id is empty or no id, or the rating is not finite."""
        if not isfinite(rating):
            raise ValueError(f"the rating is {rating}")
        self._user_codes.append(_code(user, self.users))
        self._item_codes.append(_code(item, self.items))
        self._ratings.append(rating)
        self._seconds.append(seconds)

    def tables(self, described: dict[str, Description], reviews: Path, catalogue: Path) -> Tables:
        """The latest interaction of each user and item, and the reviewed items; one that is not described has its id as title.

        Args:
            described: by item id; more than the reviewed items do no harm.
            reviews, catalogue: where both came from, for errors.

        Raises:
            InputError: not one reviewed item is described.
        """
        if not self.items.keys() & described.keys():
            raise InputError(str(catalogue), f"it describes not one item of {reviews}", "Give two files that belong together")
        log = pa.table(
            [
                _named(self.users, self._user_codes),
                _named(self.items, self._item_codes),
                np.frombuffer(self._ratings, np.float32),
                np.frombuffer(self._seconds, np.int64),
            ],
            schema=INTERACTIONS,
        )
        kept = latest(log)
        users = pa.table([pa.array(self.users), pa.array([""] * len(self.users))], schema=USERS)
        items, gaps = with_titles(described, list(self.items))
        report = {"reading": {"repeated_interactions": log.num_rows - kept.num_rows, **gaps}}
        return Tables(kept, items, users, places=(f"{reviews}, record", f"{catalogue}, record", f"{reviews}, record"), report=report)


def latest(interactions: pa.Table) -> pa.Table:
    """Of several interactions of a user and an item the latest (of the same second: the last of the file); the order stays."""
    pairs = pair_codes(interactions)
    order = np.lexsort((interactions["timestamp"].to_numpy(), pairs))  # stable
    last = np.append(pairs[order][1:] != pairs[order][:-1], True)[: len(order)]
    kept = np.zeros(len(order), bool)
    kept[order[last]] = True
    return interactions.filter(pa.array(kept))


def with_titles(described: dict[str, Description], ids: list[str]) -> tuple[pa.Table, dict[str, int]]:
    """A table of schema `ITEMS` for `ids`, and how many have no description, and how many of the others no title: their id is it."""
    known = [described.get(item, Description("")) for item in ids]
    items = pa.table(
        [
            pa.array(ids, pa.string()),
            pa.array([of.title or item for item, of in zip(ids, known, strict=True)], pa.string()),
            pa.array([of.genres for of in known], pa.list_(pa.string())),
            pa.array([of.year for of in known], pa.int32()),
            pa.array([of.people for of in known], pa.list_(pa.string())),
        ],
        schema=ITEMS,
    )
    missing = sum(item not in described for item in ids)
    untitled = sum(not of.title for of in known) - missing
    return items, {"items_without_description": missing, "items_without_title": untitled}


def plain(text: object) -> str:
    """A web shop's text without HTML tags, entities, line breaks and broken characters; "" for whatever is no text."""
    if not isinstance(text, str):
        return ""
    whole = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written to any file
    return " ".join(TAG.sub(" ", html.unescape(whole)).split())


def plain_list(texts: object) -> list[str]:
    """The `plain` members that are not empty, each once."""
    members = map(plain, texts) if isinstance(texts, list) else ()
    return list(dict.fromkeys(member for member in members if member))


def _code(key: object, known: dict[str, int]) -> int:
    if not isinstance(key, str | int) or key == "":
        raise ValueError(f"{key!r} is no id")
    name = str(key)
    code = known.get(name)
    if code is None:
        name.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
        code = known[name] = len(known)
    return code


def _named(names: dict[str, int], codes: array) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.frombuffer(codes, np.int32)), pa.array(names, pa.string())).cast(pa.string())
