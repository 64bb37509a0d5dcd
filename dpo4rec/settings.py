"""The base of every typed, strict configuration."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A part of the configuration: unknown keys and wrong types are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
