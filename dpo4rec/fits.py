"""What was fitted in a run folder, and how: each fit is a folder `recommenders/<name>` with one model a seed."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from dpo4rec import files
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.sequential import SequentialConfig
from dpo4rec.settings import Settings

Protocol = Literal["catalogue", "retrieved", "frozen"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class FitOptions(Settings):
    """What `dpo4rec fit --model` was told; `fit.json` of the fit's folder."""

    name: str
    model: Literal["sasrec", "gru4rec", "prm", "dlcm", "setrank", "mir"]
    protocol: Protocol
    texts: list[str] = Field([], description="files of user texts")
    recommender: RecommenderConfig | None = None
    sequential: SequentialConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"the name {self.name!r} is no file name: use letters, digits and . _ + -")
        if self.name in ("popularity", "random"):
            raise ValueError(f"the name {self.name!r} is that of a control: choose another")
        if self.model == "gru4rec" and self.sequential and self.sequential.heads != 1:
            raise ValueError("sequential.heads would be ignored: gru4rec has no attention")
        if bool(self.texts) != self.reads_user_text:
            key = "sequential.user_text" if self.sequential else "recommender.user_signal"
            given = "user texts are given but not read" if self.texts else "user texts are read but not given"
            raise ValueError(f"{given}: make --texts and {key} agree")
        return self

    @property
    def reads_user_text(self) -> bool:
        return self.sequential.user_text if self.sequential else bool(self.recommender and self.recommender.reads_user_text)

    @property
    def reads_item_text(self) -> bool:
        return self.sequential.item_text if self.sequential else bool(self.recommender and self.recommender.item_text)


@dataclass(frozen=True)
class FitFolder:
    """A fit on disk."""

    path: Path

    @cached_property
    def options(self) -> FitOptions:
        return FitOptions.model_validate(files.read_json(self.path / "fit.json"))

    @property
    def texts(self) -> Path | None:
        """Folder of the text vectors, None where none are read."""
        return self.path / "texts" if self.options.reads_user_text or self.options.reads_item_text else None

    @property
    def user_texts(self) -> Path | None:
        return self.path / "texts" / "users" if self.options.reads_user_text else None

    @property
    def item_texts(self) -> Path | None:
        return self.path / "texts" / "item_vectors.safetensors" if self.options.reads_item_text else None

    def seeds(self) -> list[Path]:
        """The fitted models, a folder each."""
        return sorted((self.path / "models").glob("seed-*[0-9]"))
