"""Stages of a run folder: what is done once is not done again, also by a version that has more settings."""

from pathlib import Path
from typing import Any

import pytest

from dpo4rec.files import read_json
from dpo4rec.run_folder import RunFolder
from dpo4rec.settings import Settings


class Inner(Settings):
    size: int = 4


class Older(Settings):
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)
    inner: Inner = Inner()


class NewerInner(Inner):
    depth: int = 1


class Newer(Settings):
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)
    inner: NewerInner = NewerInner()
    kind: str = "plain"


def runs(path: Path, *told: Any) -> int:
    """How often the stage's work is done when it is asked for with these settings, one driver after the other."""
    count = 0

    def work() -> None:
        nonlocal count
        count += 1
        (path / "made").write_text("by work")

    for settings in told:
        folder = RunFolder(path, {})
        folder.stage("make", settings, [path / "config.yaml"], [path / "made"], work)
        folder.release()
    return count


def test_a_version_with_new_settings_goes_on_where_they_are_at_their_default(tmp_path: Path) -> None:
    older = {"seed": 1, "jobs": [Older(rate=0.1), Older()]}
    assert runs(tmp_path, older, older) == 1
    assert runs(tmp_path, {"seed": 1, "jobs": [Newer(rate=0.1), Newer()]}) == 0
    assert read_json(tmp_path / "manifest.json")["stages"]["make"]["settings"] == {
        "seed": 1,
        "jobs": [{"rate": rate, "names": ["a"], "inner": {"size": 4}} for rate in (0.1, 0.5)],
    }


@pytest.mark.parametrize(
    "now",
    [
        {"seed": 1, "jobs": [Newer(kind="other")]},
        {"seed": 1, "jobs": [Newer(inner=NewerInner(depth=2))]},
        {"seed": 1, "jobs": [Newer(names=("a", "b"))]},
        {"seed": 1, "jobs": [Newer(inner=NewerInner(size=5))]},
        {"seed": 1, "jobs": [Newer(), Newer()]},
        {"seed": 2, "jobs": [Newer()]},
        {"seed": 1, "jobs": [Newer()], "more": 0},  # no setting's default: what a stage has always said of itself
        {"jobs": [Newer()]},
    ],
)
def test_what_is_told_otherwise_is_made_anew(tmp_path: Path, now: Any) -> None:
    assert runs(tmp_path, {"seed": 1, "jobs": [Older()]}, now) == 2


def test_a_default_that_has_changed_is_told_otherwise(tmp_path: Path) -> None:
    class Changed(Older):
        rate: float = 0.7

    assert runs(tmp_path, Older(), Changed()) == 2
    assert runs(tmp_path, Changed(rate=0.5), Older()) == 1  # the former is told otherwise again, the latter as that was
