"""A simulated film service whose users' true preferences are known: where every claim about texts can be checked.

A user loves a few genres and people and one or two decades and dislikes some genres; all else is neutral (0):

    utility = 2 * mean genre weight + era weight + sum of people weights + item quality + noise

Users are shown items by popularity, pick among them by utility, and rate by the rank of the utility among all picks, so that
55 % of ratings are above 3. Films have no plot: nothing but genres, decade and people is there to be liked.
"""

import numpy as np
import pyarrow as pa

from dpo4rec.data.config import SimulationConfig
from dpo4rec.data.schema import INTERACTIONS, ITEMS, PREFERENCES, USERS, Tables, era
from dpo4rec.files import stable_seed

GENRES = (
    "Drama", "Comedy", "Action", "Thriller", "Romance", "Crime", "Horror", "Fantasy",
    "Western", "Musical", "War", "Mystery", "Adventure", "Animation", "Documentary", "Science Fiction",
)  # fmt: skip
ADJECTIVES = """
Silent Golden Broken Hidden Distant Crimson Frozen Gentle Hollow Lonely Midnight Painted Quiet Restless Sacred Scarlet Secret Shining
Sleeping Stolen Sudden Velvet Wandering Winter Wooden Ancient Bitter Burning Crooked Electric Empty Endless Fallen Final Foreign Fragile
Hungry Invisible Iron Little Lost Lucky Northern Paper Perfect Silver Stubborn Summer Twisted Wild
"""
NOUNS = """
Harbor Garden Mirror River Letter Bridge Mountain Window Island Lantern Orchard Station Shadow Castle Clock Compass Crown Desert Door
Dream Engine Feather Field Forest Fortune Ghost Guitar Horizon House Hunter Journey Key Kingdom Ladder Lighthouse Machine Market Meadow
Memory Moon Ocean Painter Parade Passenger Piano Pilot Promise Rain Road Sailor Season Signal Sister Stranger Street Teacher Tower Train
Valley Voyage
"""
PATTERNS = ("The {} {}", "Beyond the {} {}", "Return to the {} {}")
FIRST_NAMES = """
Adra Belen Calla Dorin Edda Farro Gisla Hanno Ilka Joren Katya Lorn Mirel Nadir Odile Perrin Quilla Rurik Selma Torben Ulla Vesna Wanda
Xenia Yorick Zelda Anselm Brisa Corwin Delphine
"""
LAST_NAMES = """
Ashgrove Barrowby Calderon Dunmere Eastlake Fenwright Galloway Harrowgate Ingleby Jessamy Kestrel Lindqvist Marchetti Northam Oakden
Penhallow Quennell Ravensworth Stellan Thornbury Umberland Vantongeren Westerly Yarrow Zimmerlin Aldercott Brightwater Cloverdale
Drumlin Everhart
"""
ERAS = tuple(era(year) for year in range(1960, 2020, 10))
RATING_SHARES = (0.1, 0.15, 0.2, 0.25, 0.3)  # of 1 to 5 stars
DAY = 86_400  # seconds
SPREAD = 1.0  # standard deviation of the log popularity
EXPOSED = 4  # items shown for each one picked
TEMPERATURE = 0.4  # of the choice among the shown items, in units of utility


def simulate(config: SimulationConfig, seed: int) -> Tables:
    """Items, users, their interactions and true preferences; depends on the config and the seed alone."""
    rng = np.random.default_rng(stable_seed(seed, "simulation"))
    genres, years, people = _attributes(config, rng)  # [I, G] and [I, P] memberships, [I] years
    likes_genre, likes_era, likes_person = _preferences(config, rng)  # [U, G], [U, E], [U, P] weights
    eras = (years - 1960) // 10
    told = 2 * likes_genre @ (genres / genres.sum(1, keepdims=True)).T + likes_era[:, eras] + likes_person @ people.T
    utility = told + rng.normal(0, 0.15, config.items) + rng.normal(0, 0.2, told.shape)
    user_codes, item_codes, timestamps = _interact(utility, config, rng)
    ratings = _rate(utility[user_codes, item_codes])

    user_ids, item_ids = _ids("u", config.users), _ids("i", config.items)
    names = GENRES[: config.genres], ERAS, _people_names(config.people, rng)
    return Tables(
        pa.table([user_ids.take(pa.array(user_codes)), item_ids.take(pa.array(item_codes)), ratings, timestamps], schema=INTERACTIONS),
        pa.table(
            [item_ids, _titles(config.items, rng), _members(genres, names[0]), pa.array(years, pa.int32()), _members(people, names[2])],
            schema=ITEMS,
        ),
        pa.table([user_ids, pa.array([""] * config.users)], schema=USERS),
        places=("simulated interactions, row", "simulated items, row", "simulated users, row"),
        preferences=_truth(user_ids, (likes_genre, likes_era, likes_person), names),
    )


def _attributes(config: SimulationConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One to three genres and people of each item, the first ones frequent and the last ones rare, and a year."""
    genres = _pick(rng, np.arange(1, config.genres + 1) ** -0.7, rng.integers(1, 4, config.items))
    people = _pick(rng, np.arange(1, config.people + 1) ** -0.3, rng.integers(1, 4, config.items))
    return genres, rng.integers(1960, 2020, config.items), people


def _preferences(config: SimulationConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed weights: two or three genres loved and two or three disliked, one or two decades and three people loved."""
    users = config.users
    loved = _pick(rng, np.ones(config.genres), rng.integers(2, 4, users))
    disliked = _pick(rng, np.ones(config.genres), rng.integers(2, 4, users), taken=loved)
    eras = _pick(rng, np.ones(len(ERAS)), rng.integers(1, 3, users))
    people = _pick(rng, np.ones(config.people), np.full(users, 3))
    strength = rng.uniform(0.8, 1.2, (users, config.genres))
    return (loved - disliked) * strength, 0.8 * eras, 1.2 * people


def _pick(rng: np.random.Generator, weights: np.ndarray, counts: np.ndarray, taken: np.ndarray | None = None) -> np.ndarray:
    """counts[r] different columns of each row, drawn by weight and never where `taken`: 0/1 floats [R, C]."""
    keys = rng.exponential(size=(len(counts), len(weights))) / weights
    if taken is not None:
        keys[taken > 0] = np.inf
    return (np.argsort(np.argsort(keys, axis=1), axis=1) < counts[:, None]).astype(float)


def _interact(utility: np.ndarray, config: SimulationConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User codes, item codes and timestamps of all interactions, by user and time.

    A user is shown EXPOSED times as many items as it picks, by popularity (Gumbel top-k), and picks by softmax(utility / TEMPERATURE).
    """
    users, items = utility.shape
    mean = config.interactions_per_user
    counts = np.asarray(rng.integers(mean // 2, mean * 3 // 2, users, endpoint=True))
    popularity = rng.normal(0, SPREAD, items)
    exposure = np.argsort(np.argsort(-popularity - rng.gumbel(size=utility.shape), axis=1), axis=1)  # rank: 0 is shown first
    choice = np.where(exposure < EXPOSED * counts[:, None], utility / TEMPERATURE + rng.gumbel(size=utility.shape), -np.inf)
    best = np.argsort(-choice, axis=1)
    user_codes = np.repeat(np.arange(users), counts)
    places = np.concatenate([rng.permutation(count) for count in counts])  # the order says nothing of the liking
    start = np.asarray(rng.integers(1_000_000_000, 1_100_000_000, users))
    steps = rng.integers(1, 3 * DAY, len(places))
    since = np.cumsum(steps)
    first = np.repeat(np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    return user_codes, best[user_codes, places], start[user_codes] + since - since[first]


def _rate(utility: np.ndarray) -> pa.Array:
    """Stars by quantile of the utility over all interactions."""
    edges = np.quantile(utility, np.cumsum(RATING_SHARES)[:-1])
    return pa.array((1 + np.searchsorted(edges, utility)).astype(np.float32))


def _ids(prefix: str, count: int) -> pa.Array:
    return pa.array([f"{prefix}{number:0{len(str(count))}d}" for number in range(1, count + 1)])


def _titles(count: int, rng: np.random.Generator) -> pa.Array:
    """Unique; "The Silent Harbor" and its like come first."""
    pairs = [(adjective, noun) for adjective in ADJECTIVES.split() for noun in NOUNS.split()]
    order = rng.permutation(len(pairs))
    return pa.array([pattern.format(*pairs[code]) for pattern in PATTERNS for code in order][:count])


def _people_names(count: int, rng: np.random.Generator) -> list[str]:
    every = [f"{first} {last}" for first in FIRST_NAMES.split() for last in LAST_NAMES.split()]
    return [every[code] for code in rng.permutation(len(every))[:count]]


def _members(membership: np.ndarray, names: tuple[str, ...] | list[str]) -> pa.Array:
    return pa.array([[names[column] for column in np.flatnonzero(row)] for row in membership], pa.list_(pa.string()))


def _truth(users: pa.Array, weights: tuple[np.ndarray, ...], names: tuple[tuple[str, ...] | list[str], ...]) -> pa.Table:
    """The weights that are not 0, by user, kind and name."""
    ids = users.to_pylist()
    rows = [
        (ids[user], kind, of[column], matrix[user, column])
        for user in range(len(ids))
        for kind, matrix, of in zip(("genre", "era", "person"), weights, names, strict=True)
        for column in np.flatnonzero(matrix[user])
    ]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), PREFERENCES, strict=True)], schema=PREFERENCES
    )
