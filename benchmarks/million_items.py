"""SASRec on a simulated catalogue of a million items: seconds and peak memory of each step, each in a fresh process.

    python benchmarks/million_items.py
    python benchmarks/million_items.py --items 20000 --users 500 --full-users 50 --evaluated-users 50 --quick

Items are drawn by Zipf's law and read through the table source. Sampled softmax learns one epoch over all users. Full cross-entropy makes
a million scores for each prediction, so that its epoch goes over `--full-users` alone; its memory does not depend on their number once
they fill a batch. Evaluation finds the 100 best items for `--evaluated-users`. Seconds of an epoch are without the NDCG@10 that follows it
(of the same users at most); peak memory is the highest resident memory of the process, with that and with the saved state.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.recommenders import Result, fresh, say
from benchmarks.record import record
from dpo4rec.data.config import DataConfig
from dpo4rec.data.sequences import SequenceConfig, prepare_sequences
from dpo4rec.evaluation.metrics import accuracy
from dpo4rec.files import write_parquet
from dpo4rec.recommenders.fit_sequential import SequentialFit
from dpo4rec.recommenders.retrieval import hits_of, retrieve
from dpo4rec.recommenders.sequences import SequenceData
from dpo4rec.recommenders.sequential import SequentialConfig, SequentialRecommender


def prepared(given: argparse.Namespace) -> Result:
    """Draws interactions, writes them as tables and prepares those."""
    generator = np.random.default_rng(0)
    chances = np.cumsum(1 / np.arange(1, given.items + 1))
    shape = given.users, given.interactions_per_user
    items = np.searchsorted(chances, generator.random(shape) * chances[-1])
    pairs = np.unique(np.arange(given.users)[:, None] * given.items + items)  # a user has an item once
    generator.shuffle(pairs)  # a user's order is the file's
    columns = {"user_id": pa.array(pairs // given.items), "item_id": pa.array(pairs % given.items)}
    write_parquet(pa.table(columns), given.folder / "tables" / "interactions.parquet")
    ids = pa.array(np.arange(given.items))
    write_parquet(pa.table({"item_id": ids, "title": ids.cast(pa.string())}), given.folder / "tables" / "items.parquet")
    started = time.perf_counter()
    table = {"rating_column": None, "timestamp_column": None}
    config = DataConfig.model_validate({"source": "table", "folder": str(given.folder / "tables"), "table": table, "like_threshold": 0.0})
    summary = prepare_sequences(config, SequenceConfig(), 0, given.folder / "sequences")
    return {"seconds": time.perf_counter() - started, "interactions": summary["interactions"]}


def epoch(given: argparse.Namespace, loss: str, users: int) -> Result:
    """One epoch over so many users, of whom `evaluated_users` at most judge it."""
    data = SequenceData.load(given.folder / "sequences")
    judges = torch.arange(len(data.user_ids)) < min(users, given.evaluated_users)
    data = dataclasses.replace(data, validation_ends=torch.where(judges, data.validation_ends, data.train_ends))
    config = SequentialConfig.model_validate(
        {"embedding_dim": given.embedding_dim, "epochs": 1, "loss": loss, "precision": given.precision}
    )
    fit = SequentialFit("sasrec", config, data, None, None, 0, given.folder / f"state-{loss}")
    fit.learners = fit.learners[:users]
    model, report = fit.run()
    model.save(given.folder / "model")
    seconds = report["history"][0]["seconds"]
    tokens = int((data.train_ends - data.starts[:-1])[fit.learners].sum())
    return {"seconds": seconds, "users": len(fit.learners), "tokens_per_second": tokens / seconds, "loss": report["history"][0]["loss"]}


def evaluation(given: argparse.Namespace) -> Result:
    """The 100 best items by the model that was fitted last."""
    data = SequenceData.load(given.folder / "sequences")
    model = SequentialRecommender.load(given.folder / "model").bind(data, None)
    users = torch.arange(min(given.evaluated_users, len(data.user_ids)))
    started = time.perf_counter()
    found = retrieve(model, data, users, data.validation_ends[users], 100, None)
    metrics = accuracy(*hits_of(found.items, data, users, "test"), [10, 100])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "users_per_second": len(users) / seconds, "hr@100": float(metrics["hr@100"].mean())}


STEPS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "prepare": prepared,
    "cross_entropy_epoch": lambda given: epoch(given, "cross-entropy", given.full_users),
    "sampled_softmax_epoch": lambda given: epoch(given, "sampled-softmax", given.users),
    "evaluation": evaluation,
}
SHOWN = ("seconds", "users", "tokens_per_second", "users_per_second", "peak_memory_gib")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--interactions-per-user", type=int, default=20)
    parser.add_argument("--full-users", type=int, default=200)
    parser.add_argument("--evaluated-users", type=int, default=2_000)
    parser.add_argument("--embedding-dim", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="no file is written")
    parser.add_argument("--one", choices=STEPS, help="one step in this process, with --folder")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(given.threads)
        say(STEPS[given.one](given))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        words = [*sys.argv[1:], "--folder", folder]
        results = {step: fresh(__file__, ["--one", step, *words], given.threads) for step in STEPS}
    figures = {"items": given.items, "users": given.users, "peak_memory_gib": max(of["peak_memory_gib"] for of in results.values())}
    figures |= {f"{step}_{name}": of[name] for step, of in results.items() for name in SHOWN if name in of}
    figures = {name: round(value, 2) for name, value in figures.items()}
    if not given.quick:
        record("million_items", figures, results)
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
