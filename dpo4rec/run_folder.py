"""The run folder: the artifacts of a run on disk, and the manifest that says what was made from what.

A stage is a function from files to files. It runs when its settings, its seed, or the content of its inputs or its output differ from the
manifest's; otherwise it is skipped. Running again is resuming.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dpo4rec import __version__, files
from dpo4rec.errors import InputError
from dpo4rec.files import content_hash
from dpo4rec.settings import agrees, as_json

CONFIG = "config.yaml"
PACKAGES = ("torch", "transformers", "peft", "trl", "ray", "deepspeed", "bitsandbytes", "numpy", "pyarrow", "scikit-learn")


class RunFolder:
    """A run's folder, held by one driver at a time.

    Args:
        path: the folder; made if absent.
        config: the resolved configuration, written to `config.yaml`, or compared with the one there if any stage was done with that.
        free: dotted keys whose values may differ from the folder's own (they change no result).
        completed: the folder's own configuration with defaults for the keys that were added since it was made.

    Raises:
        InputError: another run holds the folder, it belongs to another configuration, or it holds what no run has made.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        free: tuple[str, ...] = (),
        completed: Callable[[dict[str, Any]], dict[str, Any]] = lambda own: own,
    ) -> None:
        self.path = path
        begun = any((path / own).exists() for own in (CONFIG, "manifest.json"))
        if not begun and path.is_dir() and any(not file.name.startswith(".") for file in path.iterdir()):
            raise InputError(str(path), "it is no run folder and not empty: stages would replace files of yours", "Give another --run-dir")
        self._lock = files.lock(path)
        files.mend(path)
        self.manifest: dict[str, Any] = files.read_json(path / "manifest.json") if (path / "manifest.json").exists() else {"stages": {}}
        self._keep_config(config, free, completed)
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        versions = {"dpo4rec": __version__, "python": platform.python_version(), **versions}
        if (before := self.manifest.get("versions", versions)) != versions:
            self.log("other versions", before=before, now=versions)
        self.manifest["versions"] = versions

    def release(self) -> None:
        """Lets another driver take the folder."""
        self._lock.close()

    def _keep_config(self, config: dict[str, Any], free: tuple[str, ...], completed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        file = self.path / CONFIG
        if file.exists() and any(entry["state"] == "done" for entry in self.manifest["stages"].values()):  # else it may be corrected
            check_config(completed(read_yaml(file)), config, free, file)
        with files.atomic(file) as partial:
            partial.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def stage(
        self,
        name: str,
        settings: Any,
        inputs: list[Path],
        outputs: list[Path],
        work: Callable[[], dict[str, Any] | None],
        one_piece: bool = False,
    ) -> dict[str, Any]:
        """Runs `work` unless it was done with the same settings and inputs; returns what it reported then or now.

        A stage that was begun with others starts from nothing; one that was interrupted finds its finished parts. One whose output was
        damaged or removed since mends it, or, where `work` could not tell what is whole (`one_piece`), starts from nothing.

        Args:
            settings: what JSON can hold, and parts of the configuration: a setting that is at its default and unknown to the version that
                has made the stage makes no difference.
        """
        made_of = content_of(inputs)
        entry = self.manifest["stages"].get(name, {})
        if self._done(name, settings, made_of, outputs):
            self.log("skipped", stage=name)
            return entry["report"]
        if not self._begun(name, settings, made_of) or (one_piece and entry["state"] == "done"):
            # without an entry they are another configuration's, in a folder that began as a copy; or a launcher's, of which `work` can tell
            for path in outputs if entry or not one_piece else []:
                files.remove(path)
                files.remove(files.checkpoints_of(path))
            self._record(name, {"settings": as_json(settings), "made_of": made_of, "state": "begun"})
        self.log("begun", stage=name)
        start = time.monotonic()
        report = work() or {}
        seconds = round(time.monotonic() - start, 2)
        self._record(
            name,
            {
                "settings": as_json(settings),
                "made_of": made_of,
                "state": "done",
                "content": _content(outputs),
                "seconds": seconds,
                "inputs": [self._relative(path) for path in inputs],
                "report": report,
            },
        )
        self.log("done", stage=name, seconds=seconds)
        return report

    def is_done(self, name: str, settings: Any, inputs: list[Path], outputs: list[Path]) -> bool:
        """Whether `stage` would skip its work."""
        return all(path.exists() for path in inputs) and self._done(name, settings, content_of(inputs), outputs)

    def _begun(self, name: str, settings: Any, made_of: list[str]) -> bool:
        """Whether the stage was begun or done with these settings and inputs."""
        entry = self.manifest["stages"].get(name, {})
        return entry.get("made_of") == made_of and agrees(entry["settings"], settings)

    def _done(self, name: str, settings: Any, made_of: list[str], outputs: list[Path]) -> bool:
        entry = self.manifest["stages"].get(name, {})
        return self._begun(name, settings, made_of) and entry["state"] == "done" and entry["content"] == _content(outputs)

    def _record(self, name: str, entry: dict[str, Any]) -> None:
        self.manifest["stages"][name] = entry
        files.write_json(self.manifest, self.path / "manifest.json")

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.path)) if path.is_relative_to(self.path) else path.name

    def log(self, event: str, **values: Any) -> None:
        """Appends one line to `log.jsonl`."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **values}
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def check_config(own: dict[str, Any], config: dict[str, Any], free: tuple[str, ...], file: Path) -> None:
    """Raises `InputError` when `own`, which stands in `file`, has another value than `config` of a key that is not in `free`."""
    if differing := sorted(set(_differing(own, config)) - set(free)):
        raise InputError(
            str(file),
            f"this run folder was made with another value of {', '.join(differing)}",
            "Use the same values, or another --run-dir (`run --start-from` takes over what does not depend on them)",
        )


def fork(source: Path, target: Path, without: tuple[str, ...] = ()) -> None:
    """Begins the run folder `target` with the finished stages of another run, as hard links, which cost no space (copies where the file
    system has none).

    The new run may have another configuration: what both share is skipped there, the rest is made anew and leaves the other run as it was,
    since no file of a stage is ever written in place. A `target` that exists is left alone.

    Args:
        without: paths in the folder that the new run does not begin with.

    Raises:
        InputError: `source` is no run folder.
    """
    if target.exists():
        return
    if not (source / "manifest.json").exists():
        raise InputError(str(source), "is no run folder to start from", "Run it first, or correct the path")
    with files.atomic(target, replace=False) as partial:
        hidden = shutil.ignore_patterns(".*")  # locks, checkpoints, what is half written
        shutil.copytree(source, partial, copy_function=_link, ignore=hidden)
        for own in (CONFIG, "log.jsonl", "logs", *without):
            files.remove(partial / own)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _content(outputs: list[Path]) -> str | None:
    """What the outputs hold, None where one is missing: a stage whose output was damaged or removed runs again."""
    return content_hash(*outputs) if all(path.exists() for path in outputs) else None


def content_of(inputs: list[Path]) -> list[str]:
    """A hash of each input's content. Raises `InputError` when one is missing: the stage that makes it has not run."""
    for path in inputs:
        if not path.exists():
            raise files.missing(path)
    return [content_hash(path) for path in inputs]


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises `InputError` when the file is missing or not a YAML mapping."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise files.missing(path) from error
    except OSError as error:
        raise InputError(str(path), f"it cannot be read ({error.strerror})", "Give a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or what looks like a date and is none
        raise InputError(str(path), f"not valid YAML ({error})", "Correct it") from error
    if not isinstance(value, dict):
        raise InputError(str(path), "holds no settings", "Write `section:` lines with `key: value` below them")
    return value


def _differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [path for key in keys for path in _differing(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [prefix.rstrip(".")]
