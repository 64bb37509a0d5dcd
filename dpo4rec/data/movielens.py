"""MovieLens-1M and MovieLens-100K in their official files (latin-1; GroupLens, READMEs of ml-1m and ml-100k)."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from dpo4rec.data.schema import INTERACTIONS, ITEMS, USERS, Tables
from dpo4rec.errors import InputError

FILES = {"ml-1m": ("ratings.dat", "movies.dat", "users.dat"), "ml-100k": ("u.data", "u.item", "u.user", "u.genre")}
NO_GENRE = ("(no genres listed)", "unknown", "")
SEXES = {"M": "man", "F": "woman"}
AGES = {
    "1": "a {} under 18", "18": "an 18-24 year old {}", "25": "a 25-34 year old {}", "35": "a 35-44 year old {}",
    "45": "a 45-49 year old {}", "50": "a 50-55 year old {}", "56": "a {} of 56 or older",
}  # fmt: skip
OCCUPATIONS = (
    "", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service", "doctor/health care",
    "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer", "retired", "sales/marketing", "scientist",
    "self-employed", "technician/engineer", "tradesman/craftsman", "unemployed", "writer",
)  # fmt: skip
YEAR = re.compile(r"\s*\((\d{4})\)\s*(?:\((?:V|TV)\))?\s*$")
ARTICLE = re.compile(r"^(?P<name>.+), (?P<article>The|An?|Les?|La|L'|Il|Lo|El|Los|Las|Das|Der|Die)(?P<rest>\s+\(.*)?$", re.DOTALL)
T = TypeVar("T")


def read_movielens(dataset: str, folder: Path) -> Tables:
    """Reads the official files of "ml-1m" or "ml-100k" in `folder`.

    Raises `InputError` naming file and line for whatever does not parse, and the files to put where if one is missing.
    """
    for name in FILES[dataset]:
        if not (folder / name).is_file():
            files = ", ".join(FILES[dataset])
            raise InputError(
                str(folder / name),
                "there is no such file",
                f"Put the official {files} there, or fetch them: dpo4rec prepare {dataset} --download --data {folder}",
            )
    ratings, movies, people, *genres = (folder / name for name in FILES[dataset])
    if dataset == "ml-1m":
        interactions = _parsed(ratings, lambda line: _rating(line.split("::")))
        items = _parsed(movies, _movie_1m)
        users = _parsed(people, _user_1m)
    else:
        names = [line.rpartition("|")[0] for line in _lines(genres[0])]
        interactions = _parsed(ratings, lambda line: _rating(line.split("\t")))
        items = _parsed(movies, lambda line: _movie_100k(line, names))
        users = _parsed(people, _user_100k)
    return Tables(
        _table(interactions, INTERACTIONS),
        _table(items, ITEMS),
        _table(users, USERS),
        places=(f"{ratings}, line", f"{movies}, line", f"{people}, line"),
    )


def clean_title(raw: str) -> tuple[str, int | None]:
    """Title and year of a MovieLens title: "Matrix, The (1999)" -> ("The Matrix", 1999); all else stays as it is."""
    found = YEAR.search(raw)
    title, year = (raw[: found.start()], int(found[1])) if found and found.start() else (raw, None)
    moved = ARTICLE.match(title)
    if moved:
        space = "" if moved["article"].endswith("'") else " "
        title = f"{moved['article']}{space}{moved['name']}{moved['rest'] or ''}"
    return title, year


def _lines(path: Path) -> list[str]:
    """Lines end at a line feed alone: `str.splitlines` would also cut at characters that latin-1 titles may hold."""
    lines = path.read_bytes().decode("latin-1").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(
            str(path),
            "the file is empty",
            "Restore the official file, or remove it and fetch it: dpo4rec prepare ml-1m --download --data FOLDER",
        )
    return [line.removesuffix("\r") for line in lines]


def _parsed(path: Path, parse: Callable[[str], T]) -> list[T]:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            rows.append(parse(line))
        except (ValueError, KeyError, IndexError) as error:
            cause = f"the line {line[:120]!r} does not parse ({error})"
            raise InputError(f"{path}, line {number}", cause, "Correct the line or restore the official file") from error
    return rows


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)


def _rating(fields: list[str]) -> tuple[str, str, float, int]:
    user, item, rating, timestamp = fields
    if rating not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"the rating {rating!r} is not one of 1 to 5")
    return user, item, float(rating), int(timestamp)


def _movie_1m(line: str) -> tuple[str, str, list[str], int | None, list[str]]:
    """First and last field are id and genres: a title may hold "::"."""
    item, found, rest = line.partition("::")
    raw, found_too, genres = rest.rpartition("::")
    if not (found and found_too):
        raise ValueError("expected MovieID::Title::Genres")
    title, year = clean_title(raw)
    return item, title, [genre for genre in genres.split("|") if genre not in NO_GENRE], year, []


def _movie_100k(line: str, names: list[str]) -> tuple[str, str, list[str], int | None, list[str]]:
    """Id and title, two dates, a link, and a 0 or 1 for each genre: a title may hold "|"."""
    head, _, _, _, *flags = line.rsplit("|", 3 + len(names))
    if len(flags) != len(names) or not set(flags) <= {"0", "1"}:
        raise ValueError(f"expected {len(names)} genre flags, each 0 or 1")
    item, _, raw = head.partition("|")
    title, year = clean_title(raw)
    return item, title, [name for name, flag in zip(names, flags, strict=True) if flag == "1" and name not in NO_GENRE], year, []


def _user_1m(line: str) -> tuple[str, str]:
    user, sex, age, occupation, _ = line.split("::")
    return user, _profile(AGES[age].format(SEXES[sex]), OCCUPATIONS[int(occupation)])


def _user_100k(line: str) -> tuple[str, str]:
    user, age, sex, occupation, _ = line.split("|")
    article = "an" if int(age) in (8, 11, 18, *range(80, 90)) else "a"
    return user, _profile(f"{article} {age} year old {SEXES[sex]}", "" if occupation in ("other", "none") else occupation)


def _profile(person: str, occupation: str) -> str:
    """("a 25-34 year old man", "programmer") -> "a 25-34 year old man, programmer"."""
    return f"{person}, {occupation}" if occupation else person
