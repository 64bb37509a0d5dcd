"""What to read and how to make re-ranking lists of it."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dpo4rec.settings import Settings

NO_RATING = 1.0  # the rating of every interaction where a source has none
PARTS = ("table", "amazon", "steam", "atomic", "simulation")  # sources with a part of their own in the configuration


class TableConfig(Settings):
    """Parquet or CSV files (by their suffix) inside `data.folder` and the names of their columns; None: there is no such column.

    Without a rating column every interaction has rating 1.0, so `data.like_threshold` must lie below; without a timestamp
    column a user's interactions keep the order of the file.
    """

    interactions: str = "interactions.parquet"
    items: str = "items.parquet"
    users: str | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    rating_column: str | None = "rating"
    timestamp_column: str | None = "timestamp"
    title_column: str = "title"
    genres_column: str | None = None
    year_column: str | None = None
    people_column: str | None = None
    profile_column: str | None = None
    list_separator: str = Field("|", min_length=1, description="between the genres or people of one CSV cell")

    @model_validator(mode="after")
    def _profiles_need_a_file(self) -> Self:
        if (self.users is None) != (self.profile_column is None):
            raise ValueError("users (a file) and profile_column (its text) go together: give both or neither")
        return self


class SimulationConfig(Settings):
    """The size of a simulated film service whose users' true preferences are known."""

    users: int = Field(1500, ge=10)
    items: int = Field(600, ge=50, le=9000)
    genres: int = Field(12, ge=6, le=16)
    people: int = Field(40, ge=6, le=900)
    interactions_per_user: int = Field(60, ge=16, description="the mean; users have half to one and a half of it")

    @model_validator(mode="after")
    def _enough_items(self) -> Self:
        if 6 * self.interactions_per_user > self.items:  # the busiest users are shown four times as many as they pick
            raise ValueError(f"interactions_per_user={self.interactions_per_user} needs at least {6 * self.interactions_per_user} items")
        return self


class AmazonConfig(Settings):
    """The public Amazon files of one department: JSON-lines, plain or gzip (by their suffix).

    Names are inside `data.folder`, or whole paths: then no `data.folder` is needed.
    """

    reviews: str = Field(description="Video_Games_5.json.gz (2018), Video_Games.jsonl.gz (2023) or reviews_Video_Games_5.json.gz (2014)")
    metadata: str = Field(description="meta_Video_Games.json.gz or meta_Video_Games.jsonl.gz")


class SteamConfig(Settings):
    """The public Steam files inside `data.folder`, plain or gzip (by their suffix); they hold no ratings."""

    reviews: str = "steam_reviews.json.gz"
    games: str = "steam_games.json.gz"


class AtomicConfig(Settings):
    """RecBole's atomic files `NAME.inter`, `NAME.item` and `NAME.user` inside `data.folder`; the last two may be absent.

    Fields are named without their type: `rating`, not `rating:float`.
    """

    name: str | None = Field(None, description="None: the name of the folder, as RecBole wants it")
    user_field: str = "user_id"
    item_field: str = "item_id"
    rating_field: str | None = Field("rating", description="None: no ratings, every one is 1.0")
    timestamp_field: str | None = Field("timestamp", description="None: the order of the file")
    title_field: str | None = Field(None, description="None: the first there is of title, movie_title, movie_name")
    genres_field: str | None = Field(None, description="None: the first there is of genre, genres, class, categories")
    year_field: str | None = Field(None, description="None: the first there is of release_year, year")
    people_field: str | None = Field(None, description="None: the first there is of people, brand")
    profile_field: str | None = Field(None, description="None: profile, if there is one")
    list_separator: str = Field(" ", min_length=1, description="between the members of a token_seq: RecBole's seq_separator")


class ItemTextsConfig(Settings):
    """A file with a text for each item: JSON-lines (.jsonl or .json, also .gz), Parquet or CSV, inside `data.folder` or a whole path."""

    file: str
    id_field: str = "item_id"
    text_field: str = "text"

    @model_validator(mode="before")
    @classmethod
    def _file_alone(cls, values: Any) -> Any:
        """`item_texts: plots.jsonl` is short for `item_texts: {file: plots.jsonl}`."""
        return {"file": values} if isinstance(values, str) else values


class DataConfig(Settings):
    """Where interactions come from, and how users and lists are made of them."""

    source: Literal["ml-1m", "ml-100k", "table", "amazon", "steam", "atomic", "simulation"] = "simulation"
    folder: str | None = Field(None, description="holds the source's files; none for the simulation")
    table: TableConfig | None = None
    amazon: AmazonConfig | None = None
    steam: SteamConfig | None = None
    atomic: AtomicConfig | None = None
    simulation: SimulationConfig | None = None
    item_texts: ItemTextsConfig | None = Field(None, description="knowledge about items (plots, an LLM's facts) appended to their text")
    min_rating: float | None = Field(None, description="interactions rated below are dropped; None: all stay")
    k_core: int = Field(1, ge=1, description="users and items with fewer interactions are dropped until none is left; 1: all stay")
    like_threshold: float = Field(3.0, description="a candidate's label is 1 if its rating is above")
    max_users: int | None = Field(None, ge=10, description="a seeded sample of the users; None: all")
    split_seed: int | None = Field(None, description="of what is drawn here, so that runs of several seeds share it; None: the run's")
    validation_share: float = Field(0.1, gt=0, lt=1)
    test_share: float = Field(0.1, gt=0, lt=1)
    history_length: int = Field(30, ge=1)
    list_length: int = Field(10, ge=2)
    positives_per_list: int = Field(4, ge=1, description="interactions in a list; the rest are negatives")
    max_lists_per_user: int = Field(16, ge=1)
    negatives: Literal["uniform", "popularity"] = "popularity"
    short_users: Literal["error", "drop"] = "error"

    @model_validator(mode="before")
    @classmethod
    def _own_part(cls, values: Any) -> Any:
        """The part of the chosen source has defaults, so it need not be written down."""
        if not isinstance(values, dict):
            return values
        source = values.get("source", "simulation")
        return {**values, source: values.get(source) or {}} if source in PARTS else values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for part in PARTS:
            if self.source != part and getattr(self, part) is not None:
                raise ValueError(f"{part} is set, but source={self.source} does not read it: remove it, or set source={part}")
        if self.source != "amazon" and (self.source == "simulation") != (self.folder is None):
            raise ValueError("folder must name where the source's files are; only source=simulation has none")
        if (missing := self._without_ratings()) and self.like_threshold >= NO_RATING:
            raise ValueError(f"without {missing} every rating is {NO_RATING}: set like_threshold below it (0), or nothing is liked")
        if missing and self.min_rating is not None:
            raise ValueError(f"without {missing} there is nothing that min_rating could be compared with: remove it")
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave no user for training: their sum must be below 1")
        if self.positives_per_list >= self.list_length:
            raise ValueError("positives_per_list must be below list_length: a list needs negatives")
        return self

    def _without_ratings(self) -> str | None:
        """What is missing when no interaction has a rating."""
        if self.table and self.table.rating_column is None:
            return "table.rating_column"
        if self.atomic and self.atomic.rating_field is None:
            return "atomic.rating_field"
        return "ratings (Steam has none)" if self.steam else None

    @property
    def rated(self) -> bool:
        """Whether the source has ratings; else every one is `NO_RATING`, which says nothing."""
        return self._without_ratings() is None

    @property
    def source_folder(self) -> Path:
        """The folder of the source's files, `~` resolved; without one the current folder."""
        return Path(self.folder or "").expanduser()

    def path(self, name: str) -> Path:
        """A file of the source: inside `source_folder`, or where a whole path says."""
        return self.source_folder / Path(name).expanduser()
