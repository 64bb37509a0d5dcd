"""What to read and how to make re-ranking lists of it."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dpo4rec.settings import Settings

NO_RATING = 1.0  # the rating of every interaction where a source has none


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


class DataConfig(Settings):
    """Where interactions come from, and how users and lists are made of them."""

    source: Literal["ml-1m", "ml-100k", "table", "simulation"] = "simulation"
    folder: str | None = Field(None, description="holds the source's files; none for the simulation")
    table: TableConfig | None = None
    simulation: SimulationConfig | None = None
    like_threshold: float = Field(3.0, description="a candidate's label is 1 if its rating is above")
    max_users: int | None = Field(None, ge=10, description="a seeded sample of the users; None: all")
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
        return {**values, source: values.get(source) or {}} if source in ("table", "simulation") else values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for part in ("table", "simulation"):
            if self.source != part and getattr(self, part) is not None:
                raise ValueError(f"{part} is set, but source={self.source} does not read it: remove it, or set source={part}")
        if (self.source == "simulation") != (self.folder is None):
            raise ValueError("folder must name where the source's files are; only source=simulation has none")
        if self.table and self.table.rating_column is None and self.like_threshold >= NO_RATING:
            raise ValueError(
                f"without table.rating_column every rating is {NO_RATING}: set like_threshold below it (0), or nothing is liked"
            )
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave no user for training: their sum must be below 1")
        if self.positives_per_list >= self.list_length:
            raise ValueError("positives_per_list must be below list_length: a list needs negatives")
        return self

    @property
    def source_folder(self) -> Path:
        """The folder of the source's files, `~` resolved."""
        assert self.folder is not None, "the simulation reads no folder"
        return Path(self.folder).expanduser()
