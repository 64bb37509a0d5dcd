"""Rankings and judgements as TREC run and qrels files, which trec_eval, ir-measures and others read.

A topic is a list to be ranked: a user, or one of a user's lists under a name of its own ("42#0"). The formats separate by blanks, so white
space and "%" in names are percent-encoded ("Chaos%20Syren"); `urllib.parse.unquote` gives the ids back, which join with other files. Files
are written topic by topic.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from torch import Tensor

from dpo4rec.errors import InputError
from dpo4rec.files import atomic

Ranking = tuple[str, Sequence[str], Sequence[float]]
"""A topic, its items best first, and their scores."""


def write_run(rankings: Iterable[Ranking], path: Path, tag: str) -> None:
    """Writes rankings as lines `topic Q0 item rank score tag`, ranks from 1.

    Tools sort by score, which trec_eval holds in 32 bits, and break ties by item name. So scores are written as the shortest decimals that
    give back their 32-bit values, and a score that is not below its predecessor is lowered to the next 32-bit number below it.

    Args:
        rankings: items best first, with finite scores that do not rise.
        path: file to write, whole or not at all.
        tag: name of the system.

    Raises:
        InputError: an id or the tag is empty, a topic comes twice, an item comes twice in a topic, or scores are not finite, rise, or are
            not as many as the items.
    """
    tag = _encoded(tag, f"tag of {path.name}")
    with atomic(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for topic, items, scores in _checked(rankings, path):
            written = _strictly_falling(np.array(scores, dtype=np.float32), len(items), f"{path.name}, topic {topic}")
            stream.writelines(
                f"{topic} Q0 {item} {rank} {score!s} {tag}\n"
                for rank, (item, score) in enumerate(zip(items, written, strict=True), start=1)
            )


def write_qrels(relevant: Iterable[tuple[str, Sequence[str]]], path: Path) -> None:
    """Writes the relevant items of each topic as lines `topic 0 item 1`; a topic without any leaves no line.

    Raises:
        InputError: an id is empty, a topic comes twice, or an item comes twice in a topic.
    """
    with atomic(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for topic, items, _ in _checked(((topic, items, ()) for topic, items in relevant), path):
            stream.writelines(f"{topic} 0 {item} 1\n" for item in items)


def rankings_of(topics: Iterable[str], item_ids: Sequence[str], top: Tensor, scores: Tensor) -> Iterator[Ranking]:
    """The rankings of lists of item codes: item number i of `item_ids` has code i + 1, empty places (code 0) are left out.

    Args:
        topics: the name of each list, M of them.
        top: [M, K] item codes, best first.
        scores: [M, K] their scores.
    """
    for topic, codes, values in zip(topics, top, scores, strict=True):
        filled = codes > 0
        yield topic, [item_ids[code - 1] for code in codes[filled].tolist()], values[filled].tolist()


def _checked(rankings: Iterable[Ranking], path: Path) -> Iterator[Ranking]:
    """The rankings with encoded names."""
    seen: set[str] = set()
    for topic, items, scores in rankings:
        where = f"{path.name}, topic {topic}"
        if topic in seen:
            raise InputError(where, "the topic was there before", "Give each list of a user a name of its own")
        if len(set(items)) < len(items):
            raise InputError(where, "an item stands there twice", "Rank each item once")
        seen.add(topic)
        yield _encoded(topic, where), [_encoded(item, where) for item in items], scores


def _encoded(name: str, where: str) -> str:
    if not name:
        raise InputError(where, "a name is empty, and blanks separate fields", "Give every user and item an id")
    return re.sub(r"[\s%]", lambda found: quote(found[0]), name)


def _strictly_falling(scores: np.ndarray, count: int, where: str) -> np.ndarray:
    """The scores [count] in 32 bits, each lowered as little as makes it less than the one before."""
    if len(scores) != count or not np.isfinite(scores).all():
        raise InputError(where, f"{count} items have {int(np.isfinite(scores).sum())} finite scores", "Give each item a finite score")
    if (np.diff(scores) > 0).any():
        raise InputError(where, "scores rise with the rank", "Give the items best first")
    for place in range(1, count if (np.diff(scores) == 0).any() else 0):
        scores[place] = min(scores[place], np.nextafter(scores[place - 1], np.float32(-np.inf)))
    return scores
