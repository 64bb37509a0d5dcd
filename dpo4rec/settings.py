"""The base of every typed, strict configuration."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A part of the configuration: unknown keys and wrong types are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def as_json(settings: Any, stated: bool = False) -> Any:
    """Settings as JSON has them, alone or in mappings and lists; with `stated` without those that are at their default."""
    if isinstance(settings, Settings):
        return settings.model_dump(mode="json", exclude_defaults=stated)
    if isinstance(settings, dict):
        return {key: as_json(value, stated) for key, value in settings.items()}
    return [as_json(value, stated) for value in settings] if isinstance(settings, list | tuple) else settings


def agrees(old: Any, settings: Any) -> bool:
    """Whether what was made with `old`, as `as_json` had it then, would be made alike with `settings`.

    A setting that `old` lacks has come since: it agrees at its default. One that is there no more does not.
    """
    return _agrees(old, as_json(settings), as_json(settings, stated=True))


def _agrees(old: Any, now: Any, stated: Any) -> bool:
    if isinstance(old, dict) and isinstance(now, dict):
        said = stated if isinstance(stated, dict) else {}
        return old.keys() <= now.keys() and all(
            _agrees(old[key], value, said.get(key)) if key in old else key not in said for key, value in now.items()
        )
    if isinstance(old, list) and isinstance(now, list):
        parts = stated if isinstance(stated, list) else [None] * len(now)
        return len(old) == len(now) and all(map(_agrees, old, now, parts))
    return bool(old == now)
