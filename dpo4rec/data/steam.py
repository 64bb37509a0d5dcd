"""Steam reviews and games in the public files of Kang and McAuley (SASRec, ICDM 2018); lines are Python literals.

    steam_reviews.json.gz: {u'username': u'Chaos', u'product_id': u'725280', u'date': u'2017-12-17', u'hours': 0.1, u'text': u'...', ...}
    steam_games.json.gz:   {u'id': u'725280', u'app_name': u'Tetris', u'title': u'Tetris', u'genres': [u'Casual', ...],
                            u'tags': [u'Puzzle', ...], u'release_date': u'2017-11-03', u'developer': u'Nintendo', ...}

A review says neither whether the game was liked nor on which scale (`hours` is how long it was played), so no rating is made of it.
`user_id` stands in some reviews only, `username` in all.
"""

import re
from datetime import date
from pathlib import Path

from dpo4rec.data.config import NO_RATING
from dpo4rec.data.lines import Record, each_record
from dpo4rec.data.reviews import Description, Reviews, plain, plain_list
from dpo4rec.data.schema import Tables

DAY = 86_400  # seconds
EPOCH = date(1970, 1, 1).toordinal()
YEAR = re.compile(r"\b(?:19|20)\d\d\b")  # of "2017-11-03", "Jun 2009" or "Q2 2018"; there is none in "Soon.."


def read_steam(reviews: Path, games: Path) -> Tables:
    """Reads both files; the catalogue is the reviewed games, every rating is `NO_RATING`, a timestamp is the start of a day (UTC).

    Of several reviews of a game by a user the latest counts. Genres are the game's genres or, if it has none, its tags; people its
    developer. Games without an id (there are a few) are passed over.

    Raises:
        InputError: a file is missing, empty or damaged, a line does not parse or lacks a field (naming the line), or the two files
            do not belong together.
    """
    log = Reviews()
    each_record(reviews, lambda record: _add(record, log))
    described: dict[str, Description] = {}
    each_record(games, lambda record: _describe(record, log, described))
    return log.tables(described, reviews, games)


def _add(record: Record, log: Reviews) -> None:
    day = date.fromisoformat(record["date"]).toordinal() - EPOCH
    log.add(record["username"], record["product_id"], NO_RATING, day * DAY)


def _describe(record: Record, log: Reviews, described: dict[str, Description]) -> None:
    item = str(record.get("id"))
    if item not in log.items or item in described:
        return
    year = YEAR.search(str(record.get("release_date")))
    described[item] = Description(
        title=plain(record.get("app_name")) or plain(record.get("title")),
        genres=plain_list(record.get("genres")) or plain_list(record.get("tags")),
        year=int(year[0]) if year else None,
        people=plain_list([record.get("developer")]),
    )
