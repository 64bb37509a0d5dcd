"""Amazon reviews in the public files of 2014, 2018 and 2023.

2014 (McAuley et al., SIGIR 2015) and 2018 (Ni, Li and McAuley, EMNLP 2019):

    review:   {"reviewerID": "A1", "asin": "B01", "overall": 5.0, "unixReviewTime": 1405209600, ...}
    metadata: {"asin": "B01", "title": "Tetris", "brand": "Nintendo", "category": ["Video Games", "Game Boy", "Games"], ...}
              2014: "categories": [["Video Games", "Game Boy", "Games"], [...]], and lines are Python literals

2023 (Hou et al., arXiv 2403.03952); timestamps in milliseconds:

    review:   {"user_id": "AE1", "parent_asin": "B01", "rating": 5.0, "timestamp": 1405209600000, ...}
    metadata: {"parent_asin": "B01", "title": "Tetris", "store": "Nintendo", "categories": ["Video Games", "Game Boy", "Games"], ...}
"""

import re
from pathlib import Path

from dpo4rec.data.lines import Record, each_record
from dpo4rec.data.reviews import Description, Reviews, plain, plain_list
from dpo4rec.data.schema import Tables

SCRIPT = "getTime"  # where the crawl of 2018 took a piece of JavaScript for the title
BY = re.compile(r"^\s*by\s*\n\s*")  # brands of 2018: "by\n    \n    Nintendo"


def read_amazon(reviews: Path, metadata: Path) -> Tables:
    """Reads one department; the catalogue is the reviewed items.

    Of several reviews of an item by a user the latest counts. Genres are the categories below the top one (the department), people
    the brand (2023: the store); there is no year. Of several metadata lines of an item the first counts.

    Raises:
        InputError: a file is missing, empty or damaged, a line does not parse or lacks a field (naming the line), or the two files
            do not belong together.
    """
    log = Reviews()
    each_record(reviews, lambda record: _add(record, log))
    described: dict[str, Description] = {}
    each_record(metadata, lambda record: _describe(record, log, described))
    return log.tables(described, reviews, metadata)


def _add(record: Record, log: Reviews) -> None:
    if "reviewerID" in record:
        log.add(record["reviewerID"], record["asin"], float(record["overall"]), int(record["unixReviewTime"]))
    else:
        log.add(record["user_id"], record["parent_asin"], float(record["rating"]), int(record["timestamp"]) // 1000)


def _describe(record: Record, log: Reviews, described: dict[str, Description]) -> None:
    item = record["parent_asin"] if "parent_asin" in record else record["asin"]
    if item not in log.items or item in described:
        return
    title = plain(record.get("title"))
    maker = record.get("brand") or record.get("store")
    described[item] = Description(
        title="" if SCRIPT in title else title,
        genres=_below_the_department(record.get("category") or record.get("categories") or []),
        people=plain_list([BY.sub("", maker)] if isinstance(maker, str) else []),
    )


def _below_the_department(categories: list) -> list[str]:
    """[["Games", "PC", "Puzzle"], ["Games", "PC", "Chess"]] or one such path -> ["PC", "Puzzle", "Chess"]."""
    paths = categories if categories and isinstance(categories[0], list) else [categories]
    return plain_list([category for path in paths for category in path[1:]])
