"""Two run folders against each other, user by user, or two fits of one folder.

A protocol is a way of making candidates. A recommender's folder has `evaluation/<protocol>/per_user.parquet` beside a `summary.json` with
the candidates' hash and the names of the controls; the folder of a whole run has `evaluation/per_user.parquet`, of the protocol "lists",
beside `results.json`. Columns are user_id, condition, and metrics.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dpo4rec.errors import InputError
from dpo4rec.evaluation.significance import correct, paired_bootstrap, wilcoxon
from dpo4rec.files import corrupted, missing, read_json, read_parquet

DEFAULT_METRICS = ("ndcg@10", "ndcg@5")
KEYS = ["user_id", "condition"]


@dataclass(frozen=True)
class Evaluation:
    """The per-user values of a folder under one protocol, the hash of the candidates that were ranked, and what needed no fit."""

    file: Path
    values: pd.DataFrame
    candidates_hash: str
    controls: Sequence[str] = ()

    @property
    def metrics(self) -> list[str]:
        return [str(name) for name in self.values.columns if name not in KEYS]

    @property
    def conditions(self) -> list[str]:
        return [str(name) for name in self.values["condition"].unique()]

    def of(self, condition: str, metric: str) -> pd.Series:
        """The metric under a condition, by user id; users without a value are left out."""
        rows = self.values[self.values["condition"] == condition]
        return rows.set_index("user_id")[metric].astype("float64").dropna()


def compare(
    a: Path,
    b: Path,
    metrics: Sequence[str] = (),
    seed: int = 0,
    samples: int = 10_000,
    condition: str | None = None,
    against: str | None = None,
    protocol: str | None = None,
) -> list[dict[str, Any]]:
    """Compares two folders on every protocol and metric that both have: conditions of the same name, or where each has only one, these two.

    Controls, which are the same on the same candidates, are compared only if they are named.

    Args:
        a, b: run folders, which may be one and the same; differences are a - b.
        metrics: names of columns; none: ndcg@10, or else ndcg@5, whichever both have.
        seed, samples: of the paired bootstrap.
        condition: the one of a to compare, under the protocols that have it.
        against: the one of b to compare it with; none: the one of the same name.
        protocol: the only one to compare under.

    Returns:
        A row for each: protocol, candidates_hash, a and b (conditions), metric, mean_a and mean_b over the users in both, difference,
        low, high, p_value, users (see `significance.Comparison`), wilcoxon_p_value, only_a and only_b (users with a value in one folder),
        and p_value_holm and wilcoxon_p_value_holm, each corrected over all rows.

    Raises:
        InputError: a folder has no evaluation, the candidates differ, or nothing can be compared.
    """
    if against and not condition:
        raise InputError("--against", "it belongs to --condition, which says what of the first folder to compare", "Give both")
    where, left, right = f"{a} and {b}", evaluations(a), evaluations(b)
    both = {name: (left[name], right[name]) for name in left if name in right and protocol in (None, name)}
    if not both:
        raise InputError(where, f"one has {_listed(left)}, the other {_listed(right)}", "Evaluate both under the same protocol")
    pairs = _pairs(where, both, condition, against)
    for name in pairs:
        _refuse_other_candidates(*both[name])
    rows = []
    for metric in _shared_metrics([both[name] for name in pairs], metrics):
        for name, of_protocol in pairs.items():
            if all(metric in of.metrics for of in both[name]):  # otherwise another protocol has it
                rows += [{"protocol": name, **_row(*both[name], pair, metric, seed, samples)} for pair in of_protocol]
    correct(rows, "p_value", "wilcoxon_p_value")
    return rows


def evaluations(folder: Path) -> dict[str, Evaluation]:
    """The evaluations of a run folder by protocol.

    Raises:
        InputError: there is none, or a file is damaged or lacks a column, the hash or the controls.
    """
    root = folder / "evaluation"
    keys = ("candidates_hash", "controls")
    found = {file.parent.name: _read(file, "summary.json", *keys) for file in sorted(root.glob("*/per_user.parquet"))}
    if (root / "per_user.parquet").exists():
        found["lists"] = _read(root / "per_user.parquet", "results.json", "lists_hash")
    if not found:
        raise missing(root / "per_user.parquet")
    return found


def _read(file: Path, summary: str, *keys: str) -> Evaluation:
    values = read_parquet(file).to_pandas()
    absent = [name for name in KEYS if name not in values]
    if absent:
        raise corrupted(file, KeyError(*absent))
    if values.duplicated(KEYS).any():
        user = values[values.duplicated(KEYS)].iloc[0]
        cause = f"user {user['user_id']!r} has a second row under {user['condition']!r}"
        raise InputError(str(file), cause, "Keep one row for each user and condition")
    found = read_json(file.parent / summary)
    absent = [key for key in keys if key not in found]
    if absent:
        raise corrupted(file.parent / summary, KeyError(*absent))
    return Evaluation(file, values, *(found[key] for key in keys))


def _refuse_other_candidates(a: Evaluation, b: Evaluation) -> None:
    if a.candidates_hash != b.candidates_hash:
        cause = f"the candidates are others ({a.candidates_hash} and {b.candidates_hash})"
        remedy = "Compare only runs that ranked the same candidates of the same data, or choose another --protocol"
        raise InputError(f"{a.file} and {b.file}", cause, remedy)


def _shared_metrics(pairs: list[tuple[Evaluation, Evaluation]], wanted: Sequence[str]) -> list[str]:
    shared = {metric for a, b in pairs for metric in a.metrics if metric in b.metrics}
    chosen = list(dict.fromkeys(wanted)) or [metric for metric in DEFAULT_METRICS if metric in shared][:1]
    unknown = [metric for metric in chosen if metric not in shared]
    if unknown or not chosen:
        cause = f"not both have {' or '.join(unknown or DEFAULT_METRICS)}"
        raise InputError(f"{pairs[0][0].file} and {pairs[0][1].file}", cause, f"Give --metric one of: {_listed(shared)}")
    return chosen


def _pairs(
    where: str, both: dict[str, tuple[Evaluation, Evaluation]], condition: str | None, against: str | None
) -> dict[str, list[tuple[str, str]]]:
    """The conditions to compare under each protocol; named ones under those that have them."""
    found = {name: _named(*of, condition, against or condition) if condition else _alike(*of) for name, of in both.items()}
    pairs = {name: of for name, of in found.items() if of}
    if not pairs or (len(pairs) < len(found) and not condition):
        lacking = [f"{name}: {_listed(a.conditions)} against {_listed(b.conditions)}" for name, (a, b) in both.items() if not found[name]]
        wanted = f"no {condition!r} against {against or condition!r}" if condition else "no condition is in both, controls left out"
        raise InputError(where, f"{wanted} ({'; '.join(lacking)})", "Choose with --condition and --against, or another --protocol")
    return pairs


def _named(a: Evaluation, b: Evaluation, condition: str, against: str) -> list[tuple[str, str]]:
    return [(condition, against)] if condition in a.conditions and against in b.conditions else []


def _alike(a: Evaluation, b: Evaluation) -> list[tuple[str, str]]:
    """Pairs of the same name, else the only pair; none where several stand against several."""
    left, right = ([name for name in of.conditions if name not in of.controls] for of in (a, b))
    shared = [(name, name) for name in left if name in right]
    return shared or ([(left[0], right[0])] if len(left) == len(right) == 1 else [])


def _row(a: Evaluation, b: Evaluation, conditions: tuple[str, str], metric: str, seed: int, samples: int) -> dict[str, Any]:
    left, right = a.of(conditions[0], metric), b.of(conditions[1], metric)
    x, y = left.align(right, join="inner")
    x, y = x.sort_index(), y.sort_index()  # the order of rows in a file does not matter
    first, second = torch.tensor(x.to_numpy()), torch.tensor(y.to_numpy())
    return {
        "candidates_hash": a.candidates_hash,
        "a": conditions[0],
        "b": conditions[1],
        "metric": metric,
        "mean_a": float(x.mean()),
        "mean_b": float(y.mean()),
        **asdict(paired_bootstrap(first, second, seed, samples)),
        "wilcoxon_p_value": wilcoxon(first, second),
        "only_a": len(left) - len(x),
        "only_b": len(right) - len(y),
    }


def _listed(names: Sequence[str] | dict[str, Any] | set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
