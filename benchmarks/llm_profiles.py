"""Does a real language model's text help a re-ranker beyond the history? MovieLens-1M with the texts of an 8B model.

    python benchmarks/llm_profiles.py ml-1m-folder runs/llm-profiles

The profiles (llm_user_profiles.jsonl) were written from a random 80 % of each user's ratings, so everything is learned and judged on
lists of the other 20 % (llm_profile_split_test.parquet), and the history is of the 80 %. Item knowledge: plots (movies_extrainfos.dat) and
the same model's texts of 845 films (llm_item_profiles.jsonl), on against off. Writes benchmarks/results/llm_profiles.json.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.record import record
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.pool import map_units
from dpo4rec.config import resolve
from dpo4rec.data.config import DataConfig
from dpo4rec.data.lists import build_lists, lists_hash
from dpo4rec.data.schema import codes_of
from dpo4rec.data.sources import read_source
from dpo4rec.data.splits import SPLITS, Log, split_users
from dpo4rec.evaluation.metrics import accuracy, per_user
from dpo4rec.evaluation.significance import correct, paired_bootstrap
from dpo4rec.files import read_json, read_parquet, stable_seed, write_json, write_parquet
from dpo4rec.fits import FitFolder, FitOptions
from dpo4rec.knowledge.encoders import EncoderWorkerConfig
from dpo4rec.knowledge.user_texts import encode_texts, read_user_texts
from dpo4rec.ranking import Lists
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.fitter import FitJob, Fitter, FitterConfig, job_unit

SEEDS, HISTORY, METRIC = 5, 30, "ndcg@5"
CONDITIONS = {
    "none": ("none", None, None),
    "item text": ("none", "plain", None),
    "item text and knowledge": ("none", "knowledge", None),
    "history": ("history", None, None),
    "titles": ("text", "plain", "titles"),
    "profile": ("text", "plain", "profiles"),
    "profile, item knowledge": ("text", "knowledge", "profiles"),
    "shuffled profile": ("text", "plain", "shuffled"),
    "history and item text": ("history", "plain", None),
    "history and item knowledge": ("history", "knowledge", None),
    "history and titles": ("history+text", "plain", "titles"),
    "history and profile": ("history+text", "plain", "profiles"),
    "history and profile, item knowledge": ("history+text", "knowledge", "profiles"),
}
"""Label -> user signal, which item text, whose user text."""
COMPARED = [
    ("profile", "none"),
    ("profile", "item text"),
    ("profile", "titles"),
    ("profile", "shuffled profile"),
    ("profile", "history"),
    ("history and profile", "history"),
    ("history and profile", "history and item text"),
    ("history and profile", "history and titles"),
    ("history and profile, item knowledge", "history and profile"),
    ("item text and knowledge", "item text"),
    ("profile, item knowledge", "profile"),
    ("history and item knowledge", "history and item text"),
]


@dataclass(frozen=True)
class Told(Log):
    """A log whose users' first `told` rows are what texts and histories may know, all others are for lists."""

    told: np.ndarray

    def history_lengths(self, longest: int) -> np.ndarray:
        return self.told


def told_log(source: Path) -> tuple[Told, pa.Table]:
    """The ratings, each user's known 80 % before the other 20 %, both in time order; and the items."""
    tables = read_source(DataConfig(source="ml-1m", folder=str(source)), seed=0)
    log = Log.of(tables)
    split = read_parquet(source / "llm_profile_split_test.parquet")
    users, items = (codes_of(split[name].cast(pa.string()), ids) for name, ids in (("user_id", log.users), ("movie_id", log.items)))
    held = np.isin(log.owners() * len(log.items) + log.item_codes, users * len(log.items) + items)
    order = np.lexsort((log.timestamps, held, log.owners()))
    told = np.bincount(log.owners()[~held], minlength=len(log.users))
    rows = (log.item_codes[order], log.ratings[order], log.timestamps[order])
    return Told(log.users, log.items, *rows, log.starts, told), tables.items


def knowledge(source: Path) -> dict[str, str]:
    """Plot and the model's text of each film that has them."""
    found: dict[str, str] = {}
    for line in (source / "movies_extrainfos.dat").read_text(encoding="latin-1").split("\n"):
        fields = line.split("::")
        if len(fields) == 11 and fields[9] not in ("", "N/A"):
            found[fields[0]] = fields[9]
    for line in (source / "llm_item_profiles.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[str(row["movie_id"])] = f"{found.get(str(row['movie_id']), '')} {row['text']}".strip()
    return found


def write_data(source: Path, out: Path) -> None:
    """A data folder in the layout of the frozen lists, and `items-knowledge.parquet` with the longer item texts."""
    log, items = told_log(source)
    config = DataConfig(source="ml-1m", folder=str(source), max_lists_per_user=6)
    splits = split_users(len(log.users), 0.1, 0.25, seed=0)
    of_training = splits[log.owners()] == SPLITS.index("train")
    known = np.arange(len(log.item_codes)) - np.repeat(log.starts[:-1], log.counts) < np.repeat(log.told, log.counts)
    popularity = np.bincount(log.item_codes[known & of_training], minlength=len(log.items)) + 1.0
    lists = build_lists(log, config, popularity, seed=0)
    facts = knowledge(source)
    texts = [f"{row['text']} {facts.get(row['item_id'], '')}".strip() for row in items.to_pylist()]
    column = items.column_names.index("text")
    write_parquet(items, out / "items.parquet")
    write_parquet(items.set_column(column, "text", pa.array(texts)), out / "items-knowledge.parquet")
    users = {"user_id": log.users, "profile": [""] * len(log.users), "split": np.array(SPLITS)[splits].tolist()}
    write_parquet(pa.table(users), out / "users.parquet")
    parts = [slice(max(start, start + told - HISTORY), start + told) for start, told in zip(log.starts, log.told, strict=False)]
    histories = {
        "user_id": log.users,
        "item_ids": pa.array([log.items.take(pa.array(log.item_codes[part])).to_pylist() for part in parts]),
        "ratings": pa.array([log.ratings[part].tolist() for part in parts], pa.list_(pa.float32())),
    }
    write_parquet(pa.table(histories), out / "histories.parquet")
    write_parquet(lists, out / "lists.parquet")
    write_json({"lists_hash": lists_hash(lists), "lists": len(lists), "items_with_knowledge": len(facts)}, out / "summary.json")


def write_texts(source: Path, data: Path, out: Path) -> None:
    """The profiles, the same of other users of the split, and the titles of each history."""
    rows = [json.loads(line) for line in (source / "llm_user_profiles.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {str(row["user_id"]): row["text"] for row in rows}
    users = read_parquet(data / "users.parquet").to_pylist()
    write_parquet(pa.table({"user_id": list(texts), "text": list(texts.values())}), out / "profiles.parquet")
    other: dict[str, str] = {}
    for split in SPLITS:
        ids = sorted((row["user_id"] for row in users if row["split"] == split), key=lambda user: stable_seed("shuffled", user))
        other |= dict(zip(ids, ids[1:] + ids[:1], strict=True))
    write_parquet(pa.table({"user_id": list(other), "text": [texts[user] for user in other.values()]}), out / "shuffled.parquet")
    titles = dict(zip(*(read_parquet(data / "items.parquet")[name].to_pylist() for name in ("item_id", "title")), strict=True))
    histories = read_parquet(data / "histories.parquet").to_pylist()
    listed = ["; ".join(titles[item] for item in row["item_ids"]) for row in histories]
    write_parquet(pa.table({"user_id": [row["user_id"] for row in histories], "text": listed}), out / "titles.parquet")


def fit(name: str, data: Path, texts: Path, folder: Path) -> FitFolder:
    """Five seeds of PRM under a condition; finished ones are skipped."""
    signal, item_text, whose = CONDITIONS[name]
    recommender = RecommenderConfig(model="prm", user_signal=signal, item_text=item_text is not None)
    files = [str(texts / f"{whose}.parquet")] if whose else []
    plain = name.replace(",", "").replace(" ", "-")
    options = FitOptions(name=plain, model="prm", protocol="frozen", texts=files, recommender=recommender)
    made = FitFolder(folder / plain)
    write_json(options.model_dump(mode="json"), made.path / "fit.json")
    if made.texts is not None and not (made.texts / "item_vectors.safetensors").exists():
        items = read_parquet(data / ("items-knowledge.parquet" if item_text == "knowledge" else "items.parquet"))
        users = read_parquet(data / "users.parquet").to_pylist()
        base = resolve("quickstart", None, [])
        encoder = EncoderWorkerConfig(encoder=base.encoder, folder=str(made.texts), language_model=base.llm, source="")
        learners = [row["user_id"] for row in users if row["split"] == "train"]
        encode_texts(encoder, items, read_user_texts([Path(file) for file in files]) if files else None, learners)
    config = FitterConfig(data=str(data), item_vectors=str(made.item_texts) if made.item_texts else None)
    of_users = [str(made.user_texts)] if made.user_texts else []
    jobs = [
        FitJob(out=str(made.path / "models" / f"seed-{n}"), recommender=recommender, seed=stable_seed("profiles", n), texts=of_users)
        for n in range(SEEDS)
    ]
    units = [job_unit(Path(job.out).name, job) for job in jobs]
    map_units(Fitter, config, units, made.path / "models" / "fits", ClusterConfig(kind="debug", threads_per_worker=1))
    return made


def values_of(source: Lists, made: FitFolder) -> dict[str, torch.Tensor]:
    """Per-user values [U] of each metric, averaged over seeds."""
    found = [accuracy(ranking.hits, source.relevant, source.cutoffs) for ranking in source.rankings(made)]
    return {name: per_user(torch.stack([of[name] for of in found]).mean(0), source.users, len(source.data.user_ids)) for name in found[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("run_dir", type=Path)
    given = parser.parse_args()
    data, texts = given.run_dir / "data", given.run_dir / "texts"
    if not (data / "summary.json").exists():
        write_data(given.source, data)
    if not (texts / "titles.parquet").exists():
        write_texts(given.source, data, texts)
    fitted = {name: fit(name, data, texts, given.run_dir / "recommenders") for name in CONDITIONS}
    source = Lists(data)
    values = {name: values_of(source, made) for name, made in fitted.items()}
    rows = [{"a": a, "b": b, **vars(paired_bootstrap(values[a][METRIC], values[b][METRIC], seed=0))} for a, b in COMPARED]
    correct(rows, "p_value")
    figures = {f"{METRIC} {name}": round(float(of[METRIC].nanmean()), 4) for name, of in values.items()}
    figures |= {f"{row['a']} - {row['b']}": round(row["difference"], 4) for row in rows}
    metrics = {name: {metric: float(value.nanmean()) for metric, value in of.items()} for name, of in values.items()}
    raw = {"comparisons": rows, "metrics": metrics, "data": read_json(data / "summary.json"), "test_users": int(rows[0]["users"])}
    record("llm_profiles", {**figures, "seeds": SEEDS, "test_users": rows[0]["users"]}, raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
