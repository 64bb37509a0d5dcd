"""What each user signal is worth to each re-ranker before any alignment: the baseline that aligned texts must beat.

    python benchmarks/controls.py frozen runs/ml-1m runs/controls
    python benchmarks/controls.py retrieved runs/ml-1m runs/controls --set 'retrieved.file=retrieved_candidates.parquet' ...

The first folder is a finished run, whose data and untuned texts are used; the second is made, or continued. Writes
benchmarks/results/controls_<protocol>.json.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.record import record
from dpo4rec.config import recommender_of, resolve
from dpo4rec.driver import Run
from dpo4rec.evaluation.significance import correct, paired_bootstrap
from dpo4rec.files import read_json, read_parquet, stable_seed, write_parquet
from dpo4rec.knowledge.user_texts import read_user_texts
from dpo4rec.measure import Measurement
from dpo4rec.recommend import Recommenders
from dpo4rec.report.progress import ProgressDisplay

MODELS = ("prm", "dlcm", "setrank", "mir")
METRIC = {"frozen": "ndcg@5", "retrieved": "ndcg@10"}
SETTINGS = {
    "frozen": [],
    "retrieved": [f"recommender.{s}" for s in ("loss=softmax", "selection_cutoff=10", "epochs=6", "batch_size=32", "learning_rate=1e-3")],
}
Signals = dict[str, tuple[str, bool, str | None]]
"""Label -> user signal, item text, whose texts."""
Pairs = tuple[tuple[str, str], ...]
Write = Callable[[Path, Path, Path, int], None]
"""Writes the texts that signals name: a source's run folder, data folder, folder to write to, seed."""
SIGNALS: Signals = {
    "none": ("none", False, None),
    "item text": ("none", True, None),
    "history": ("history", False, None),
    "titles": ("text", True, "titles"),
    "untuned": ("text", True, "untuned"),
    "shuffled": ("text", True, "shuffled"),
    "history+untuned": ("history+text", True, "untuned"),
}
COMPARED = (
    ("history", "none"),
    ("titles", "history"),
    ("untuned", "item text"),
    ("untuned", "titles"),
    ("untuned", "shuffled"),
    ("history+untuned", "history"),
)


def write_texts(source: Path, data: Path, out: Path, seed: int) -> None:
    """The untuned texts, the same texts of other users of the same split, and the titles of each user's history."""
    chosen = read_json(source / "evaluation" / "temperatures.json")["chosen"]["untuned"]
    folders = [source / "round-0" / "samples", source / "evaluation" / "texts" / f"untuned-test-t{chosen:g}" / "samples"]
    untuned = read_user_texts(folders)
    write_parquet(untuned, out / "untuned.parquet")
    splits = dict(zip(*(read_parquet(data / "users.parquet")[name].to_pylist() for name in ("user_id", "split")), strict=True))
    stranger = {}
    for split in sorted(set(splits.values())):
        users = sorted((user for user in splits if splits[user] == split), key=lambda user: stable_seed(seed, "shuffled", user))
        stranger |= dict(zip(users, users[1:] + users[:1], strict=True))
    write_parquet(
        untuned.set_column(0, "user_id", pa.array([stranger[user] for user in untuned["user_id"].to_pylist()])), out / "shuffled.parquet"
    )
    titles = dict(zip(*(read_parquet(data / "items.parquet")[name].to_pylist() for name in ("item_id", "title")), strict=True))
    rows = read_parquet(data / "histories.parquet").to_pylist()
    listed = ["; ".join(titles[item] for item in row["item_ids"]) for row in rows]
    write_parquet(pa.table({"user_id": [row["user_id"] for row in rows], "text": listed}), out / "titles.parquet")


def fits(protocol: str, texts: Path, signals: Signals) -> list[tuple[str, str, list[str], list[str]]]:
    """Name, model, settings and text files of every fit."""
    found = []
    for model in MODELS:
        for label, (signal, item_text, whose) in signals.items():
            own = [f"recommender.user_signal={signal}", f"recommender.item_text={str(item_text).lower()}", *SETTINGS[protocol]]
            found.append((f"{model}-{label.replace(' ', '-')}", model, own, [str(texts / f"{whose}.parquet")] if whose else []))
    return found


def comparisons(per_user: Path, protocol: str, compared: Pairs) -> list[dict[str, Any]]:
    """`compared` for each model, p-values corrected over all of them."""
    values = read_parquet(per_user).to_pandas().pivot(index="user_id", columns="condition", values=METRIC[protocol])
    rows = []
    for model in MODELS:
        for a, b in compared:
            names = [f"{model}-{label.replace(' ', '-')}-{protocol}" for label in (a, b)]
            if all(name in values for name in names):
                pair = [torch.tensor(values[name].to_numpy()) for name in names]
                rows.append({"model": model, "a": a, "b": b, **vars(paired_bootstrap(*pair, seed=0))})
    correct(rows, "p_value")
    return rows


def measure(result: str, description: str | None, write: Write, signals: Signals, compared: Pairs) -> None:
    """Fits every re-ranker on every signal (what is finished is skipped), measures, compares, and records `<result>_<protocol>`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=METRIC)
    parser.add_argument("source", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    run = Run(resolve(None, given.source / "config.yaml", given.set), given.run_dir, ProgressDisplay())
    recommenders, texts = Recommenders(run), run.folder / f"{given.protocol}-texts"
    if not texts.exists():
        write(given.source, recommenders.data_of(given.protocol), texts, run.config.seed)
    for name, model, settings, files in fits(given.protocol, texts, signals):
        recommenders.fit(recommender_of(run.config, model, f"{name}-{given.protocol}", given.protocol, files, settings))
    measurement = Measurement(recommenders)
    summary = measurement.measure(given.protocol, measurement.protocols()[given.protocol])
    rows = comparisons(run.folder / "evaluation" / given.protocol / "per_user.parquet", given.protocol, compared)
    metric = METRIC[given.protocol]
    figures = {f"{metric} {name.removesuffix('-' + given.protocol)}": round(of[metric], 4) for name, of in summary["metrics"].items()}
    figures |= {f"{row['model']}: {row['a']} - {row['b']}": round(row["difference"], 4) for row in rows}
    figures |= {"test_users": summary["users"], "seeds": run.config.evaluation.seeds}
    record(f"{result}_{given.protocol}", figures, {"comparisons": rows, "summary": summary})


if __name__ == "__main__":
    measure("controls", __doc__, write_texts, SIGNALS, COMPARED)
