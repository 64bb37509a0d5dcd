"""Speed of the recommenders against plain implementations of the common kind, on MovieLens-1M, at 1 and at 2 threads.

    python benchmarks/recommenders.py --data data/ml-1m
    python benchmarks/recommenders.py --data data/ml-1m --users 64 --loop 8 --lists 64 --repeats 1 --quick

Every measurement runs in a fresh process; a rate is the median of the repetitions after a warm-up. Both sides of a ratio have the same
model, data and number of threads; plain is fp32, and bf16 is left out where the processor has no such products.

- training: epochs of SASRec (width 64, 2 layers, length 200, full cross-entropy) over the training parts of the same users of the 5-core.
  Plain: batches of 128 users padded to full length, all logits at once, `F.cross_entropy` with `ignore_index`, AdamW. A token is an item,
  never padding.
- evaluation: NDCG@10 on the whole catalogue, items already seen left out. Plain: one user after the other, all scores sorted; the
  raw results have the value of both sides for the same users.
- scoring: logits of a PRM for pairs of a list of 10 and a text vector, as the reward wants them: 8 texts for each list. Plain: one pair
  after the other.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import record
from dpo4rec.data.config import DataConfig
from dpo4rec.data.prepare import prepare
from dpo4rec.data.sequences import SequenceConfig, prepare_sequences
from dpo4rec.evaluation.metrics import accuracy
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.fit_sequential import SequentialFit, bf16_products
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.model import Reranker, Sizes
from dpo4rec.recommenders.retrieval import hits_of, retrieve
from dpo4rec.recommenders.scoring import logits_of
from dpo4rec.recommenders.sequences import SequenceData
from dpo4rec.recommenders.sequential import SequentialConfig, SequentialRecommender

LENGTH, BATCH, TEXT_DIM, TEXTS_PER_LIST = 200, 128, 128, 8
Result = dict[str, Any]


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """The median of the repetitions after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def prepared(given: argparse.Namespace) -> Result:
    """Both data folders, in a process of its own: a process begins with the peak memory of the one that starts it."""
    source = {"source": "ml-1m", "folder": given.data, "max_users": given.users}
    prepare_sequences(DataConfig.model_validate(source | {"k_core": 5}), SequenceConfig(), 0, given.folder / "sequences")
    prepare(DataConfig.model_validate(source), 0, given.folder / "lists")
    return {}


def training(given: argparse.Namespace, precision: Literal["fp32", "bf16"]) -> Result:
    """A fit of ours as a user gets it; its own report has the seconds of each epoch."""
    data = SequenceData.load(given.folder / "sequences")
    config = SequentialConfig(max_length=LENGTH, epochs=given.repeats + 1, patience=given.repeats + 1, precision=precision)
    fit = SequentialFit("sasrec", config, data, None, None, 0, given.folder / f"state-{precision}-{given.threads}")
    model, report = fit.run()
    model.save(given.folder / "model")
    seconds = statistics.median(epoch["seconds"] for epoch in report["history"][1:])
    weights = next(iter(fit.optimizer.state.values()))  # AdamW counts its steps
    return training_rates(data, int(weights["step"]) / config.epochs, seconds)


def training_plain(given: argparse.Namespace) -> Result:
    data = SequenceData.load(given.folder / "sequences")
    users = torch.arange(len(data.user_ids))
    sequences = data.windows(users, data.train_ends, LENGTH + 1)  # what is read and the item that follows, as in ours
    sequences = F.pad(sequences, (0, LENGTH + 1 - sequences.shape[1]))
    model = SequentialRecommender.made_for("sasrec", SequentialConfig(max_length=LENGTH), data, None, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def epoch() -> None:
        for batch in sequences[torch.randperm(len(sequences))].split(BATCH):
            optimizer.zero_grad()
            loss_plain(model, batch).backward()
            optimizer.step()

    return training_rates(data, math.ceil(len(users) / BATCH), seconds_of(epoch, given.repeats))


def loss_plain(model: SequentialRecommender, sequences: Tensor) -> Tensor:
    """Mean over the items of [B, T], 0 at padding, from logits [B, T, I] of all places."""
    matrix = model.item_matrix()
    logits = model(matrix, sequences[:, :-1], None) @ matrix[1:].T
    return F.cross_entropy(logits.flatten(0, 1), sequences.flatten() - 1, ignore_index=-1)


def training_rates(data: SequenceData, steps: float, seconds: float) -> Result:
    """Rates of one epoch."""
    tokens = int((data.train_ends - data.starts[:-1]).clamp(max=LENGTH + 1).sum())
    return {"tokens_per_second": tokens / seconds, "steps_per_second": steps / seconds, "tokens_per_step": tokens / steps}


def fitted(given: argparse.Namespace) -> tuple[SequentialRecommender, SequenceData]:
    """The model that `training` left."""
    data = SequenceData.load(given.folder / "sequences")
    return SequentialRecommender.load(given.folder / "model").bind(data, None), data


def evaluation(given: argparse.Namespace) -> Result:
    model, data = fitted(given)
    users = torch.arange(len(data.user_ids))

    def ndcg() -> Tensor:
        found = retrieve(model, data, users, data.validation_ends, 10, None)
        return accuracy(*hits_of(found.items, data, users, "test"), [10])["ndcg@10"]

    return {"users_per_second": len(users) / seconds_of(ndcg, given.repeats), "ndcg@10_of_loop_users": float(ndcg()[: given.loop].mean())}


def evaluation_plain(given: argparse.Namespace) -> Result:
    model, data = fitted(given)

    @torch.no_grad()
    def ndcg() -> float:
        return statistics.mean(ndcg_plain(model, data, user) for user in range(given.loop))

    return {"users_per_second": given.loop / seconds_of(ndcg, given.repeats), "ndcg@10_of_loop_users": ndcg()}


def ndcg_plain(model: SequentialRecommender, data: SequenceData, user: int) -> float:
    """NDCG@10 of one user with one test item."""
    seen = data.codes[data.starts[user] : data.validation_ends[user]].long()
    matrix = model.item_matrix()
    scores = model(matrix, seen[None, -LENGTH:], None)[0, -1] @ matrix.T
    scores[0] = scores[seen] = scores[model.warm == 0] = -torch.inf
    target = int(data.codes[data.validation_ends[user]])
    ranking = scores.argsort(descending=True)[:10].tolist()
    return 1 / math.log2(ranking.index(target) + 2) if target in ranking else 0.0


def scoring_pairs(given: argparse.Namespace, signal: Literal["text", "history+text"]) -> tuple[Reranker, RankingData, Tensor, Tensor]:
    """A PRM with random weights, its data, and the list [M] and text vector [M, TEXT_DIM] of each pair."""
    data = RankingData.load(given.folder / "lists")
    torch.manual_seed(0)
    model = Reranker(RecommenderConfig(model="prm", user_signal=signal), Sizes.of(data, TEXT_DIM))
    model.bind(data, torch.randn(len(data.item_ids), TEXT_DIM))
    lists = torch.arange(min(given.lists, len(data.candidates))).repeat(TEXTS_PER_LIST)
    return model.eval(), data, lists, torch.randn(len(lists), TEXT_DIM)


def scoring(given: argparse.Namespace, signal: Literal["text", "history+text"]) -> Result:
    pairs = scoring_pairs(given, signal)
    return {"lists_per_second": len(pairs[2]) / seconds_of(lambda: logits_of(*pairs), given.repeats)}


def scoring_plain(given: argparse.Namespace, signal: Literal["text", "history+text"]) -> Result:
    model, data, lists, vectors = scoring_pairs(given, signal)
    count = min(len(lists), 8 * given.loop)

    @torch.no_grad()
    def one_by_one() -> None:
        for row, vector in zip(lists[:count].split(1), vectors.split(1), strict=False):
            model(data.candidates[row], data.list_users[row], vector)

    return {"lists_per_second": count / seconds_of(one_by_one, given.repeats)}


MEASUREMENTS: dict[str, tuple[str, dict[str, Callable[[argparse.Namespace], Result]]]] = {
    "training": (
        "tokens_per_second",
        {"fp32": lambda given: training(given, "fp32")}
        | ({"bf16": lambda given: training(given, "bf16")} if bf16_products() else {})
        | {"plain": training_plain},
    ),
    "evaluation": ("users_per_second", {"ours": evaluation, "plain": evaluation_plain}),
    "scoring_text": (
        "lists_per_second",
        {"ours": lambda given: scoring(given, "text"), "plain": lambda given: scoring_plain(given, "text")},
    ),
    "scoring_history_and_text": (
        "lists_per_second",
        {"ours": lambda given: scoring(given, "history+text"), "plain": lambda given: scoring_plain(given, "history+text")},
    ),
}
"""What is measured -> its rate, and its sides."""


def fresh(script: str, words: list[object], threads: int) -> Result:
    """Runs the script in a fresh process of so many threads; the JSON of its last line, and its peak resident memory in GiB."""
    done = subprocess.run(
        [sys.executable, script, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    print(" ".join(map(str, words[:2])), json.dumps(result), flush=True)
    return result


def say(result: Result) -> None:
    """The last line of a process that `fresh` started."""
    print(json.dumps({**result, "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def compare(given: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[Result]]:
    """All measurements, and the figures made of them."""
    sizes = ["--folder", folder, "--users", given.users, "--loop", given.loop, "--lists", given.lists, "--repeats", given.repeats]
    fresh(__file__, ["--one", "prepare", "--data", given.data, *sizes], 1)
    figures: dict[str, float] = {"users": given.users}
    results = []
    for threads in given.threads_tried:
        tail = "1_thread" if threads == 1 else f"{threads}_threads"
        for name, (rate, sides) in MEASUREMENTS.items():
            rates = {}
            for side in sides:
                result = fresh(__file__, ["--one", f"{name}.{side}", "--threads", threads, *sizes], threads)
                results.append({"measurement": name, "side": side, "threads": threads, **result})
                rates[side] = result[rate]
                named = {key: value for key, value in result.items() if key.endswith("_per_second")}
                figures |= {f"{name}_{key}_{side}_{tail}": round(value, 2) for key, value in named.items()}
            ours = [side for side in sides if side != "plain"]
            figures |= {f"{name}_ratio_{side}_vs_plain_{tail}": round(rates[side] / rates["plain"], 2) for side in ours}
    return figures, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the official MovieLens-1M files")
    parser.add_argument("--users", type=int, default=512, help="whose sequences are learned and evaluated")
    parser.add_argument("--loop", type=int, default=100, help="users of the plain evaluation; 8 times as many pairs of the plain scoring")
    parser.add_argument("--lists", type=int, default=1024, help="scored with 8 texts each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads-tried", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="no file is written")
    parser.add_argument("--one", help="one step in this process: prepare or MEASUREMENT.SIDE, with --folder and --threads")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(given.threads)
        name, _, side = given.one.partition(".")
        say(prepared(given) if name == "prepare" else MEASUREMENTS[name][1][side](given))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures, results = compare(given, Path(folder))
    if not given.quick:
        record("recommenders", figures, results)
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
