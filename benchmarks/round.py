"""A whole round (sample, encode, score, pair, align) of ours against the obvious script: same model, data, machine and amount of work.

    python benchmarks/round.py                                   # writes benchmarks/results/round.json
    python benchmarks/round.py --users 48 --samples 4 --quick

Model: the shape of benchmarks/dpo.py (hidden 256, 6 layers, vocabulary 8,000, fp32) with random weights and one token a word: it almost
never ends a text, so that every answer has all its tokens, on both sides. Data: simulated users; prompts of about 200 tokens. Ours is what
a user runs: the stages of the driver on a run folder, in debug mode. The script is benchmarks/obvious_script.py. The script gets the run's
encoder and fitted recommenders; the time of fitting them is on neither side. Each side in a fresh process; imports are not counted, loading
models is. The sides take turns, and the fastest of each side's `--repeats` counts: other tenants of a machine make single runs differ by a
third. Sampled are the training and validation users, scored and paired the training users.

- time_ratio_script_over_ours: seconds of the script's round / of ours.
- share_of_scoring: encoding and scoring in our round; fitting, which would make it smaller, is left out.
- texts_per_second: scored texts / seconds of encoding and scoring. lists_per_second: (scored text, list, recommender) / seconds of scoring.
- fit_lists_per_second: training lists x epochs, summed over the fits / seconds of the fitting stage.
- bytes_per_...: what the round leaves on disk.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from benchmarks.dpo import PER_STEP, make_model
from benchmarks.obvious_script import difference, run_script
from benchmarks.recommenders import fresh, say
from benchmarks.record import record
from dpo4rec.config import Config
from dpo4rec.driver import Run
from dpo4rec.files import read_parquet
from dpo4rec.knowledge.prompts import compose
from dpo4rec.recommenders.lists import RankingData

Result = dict[str, Any]


def configured(given: argparse.Namespace) -> Config:
    threads = {"threads_per_worker": given.threads, "training_threads": given.threads}
    return Config.model_validate(
        {
            "rounds": 1,
            "data": {"simulation": {"users": given.users}, "max_lists_per_user": 8},
            "prompt": {"role": "", "request": "Preferences:", "history_items": 15, "profile": False},
            "llm": {"name": str(given.folder / "model")},
            "sampling": {"samples": given.samples, "decoding": {"max_new_tokens": given.tokens}},
            "pairs": {"format_gate": False},  # texts that never end are not well-formed
            "alignment": {"pairs_per_step": PER_STEP, "checkpoint_every_steps": 10**6},
            "cluster": threads,
        }
    )


def ours(given: argparse.Namespace) -> Result:
    """The driver's stages, from the data to the next adapter; seconds of those that are a round's."""
    run = Run(configured(given), given.folder / "run")
    run.prepare_data()
    make_model(given.folder / "model", words_of(run))
    run.prepare()
    parts: dict[str, Callable[[int], Any]] = {"sampling": run.sample, "fit": run.fit, "scoring": run.score, "pairs": run.pair}
    seconds = {part: timed(work) for part, work in {**parts, "alignment": run.align}.items()}
    stages = {name: stage["seconds"] for name, stage in run.folder.manifest["stages"].items()}
    seconds["encoding"] = stages["round-0/encode"]
    seconds["sampling"] -= stages["round-0/encode"] + stages["encoder"]  # the encoder is fitted once a run: the script gets it, too
    fit = seconds.pop("fit")
    return {"seconds": seconds, "fit_seconds": fit, "stages": stages, **made(run, fit)}


def words_of(run: Run) -> list[str]:
    """All words of all prompts, ascending."""
    rows = read_parquet(run.folder / "data" / "histories.parquet").to_pylist()
    prompts = [compose(run.config.prompt, run.catalogue, "", row["item_ids"], row["ratings"]) for row in rows]
    return sorted({word for prompt in prompts for word in prompt.split()})


def timed(work: Callable[[int], Any]) -> float:
    started = time.perf_counter()
    work(0)
    return time.perf_counter() - started


def made(run: Run, fit_seconds: float) -> Result:
    """What our round made, in numbers and bytes."""
    here, config = run.folder / "round-0", run.config
    prompts, samples = read_parquet(run.folder / "prompts"), read_parquet(here / "samples")
    scores, pairs = read_parquet(here / "scores"), read_parquet(here / "pairs" / "pairs.parquet")
    data = RankingData.load(run.folder / "data")
    lists = len(data.lists_of(data.users_of("train")))
    fitted = lists * (config.reward.folds - 1) * config.reward.seeds * config.recommender.epochs  # each list in all folds but its own
    return {
        "texts": len(samples),
        "scored_texts": len(scores),
        "scored_lists": lists * config.sampling.samples * config.reward.seeds,
        "pairs": len(pairs),
        "prompt_tokens": pc.mean(pc.list_value_length(prompts["prompt_ids"])).as_py(),
        "answer_tokens": pc.mean(pc.list_value_length(samples["token_ids"])).as_py(),
        "mean_reward": pc.mean(scores["reward"]).as_py(),
        "fit_lists_per_second": fitted / fit_seconds,
        "bytes_per_user_prompts": size(run.folder / "prompts") / len(prompts),
        "bytes_per_text": (size(here / "samples") + size(here / "vectors")) / len(samples) + size(here / "scores") / len(scores),
        "bytes_per_pair": size(here / "pairs" / "pairs.parquet") / len(pairs),
        "bytes_adapter": size(here / "adapter"),
    }


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def script(given: argparse.Namespace) -> Result:
    config, run = configured(given), given.folder / "run"
    return {**run_script(config, run, given.folder, given.trl_batch), "largest_difference_of_rewards": difference(config, run, 8)}


def figures_of(mine: Result, theirs: Result) -> dict[str, float]:
    a, b = mine["seconds"], theirs["seconds"]
    scoring = a["encoding"] + a["scoring"]
    both = {
        "sampling": (b["sampling"], a["sampling"]),
        "encoding_and_scoring": (b["encoding and scoring"], scoring),
        "pairs_and_alignment": (b["pairs and alignment"], a["pairs"] + a["alignment"]),
    }
    total = sum(a.values())
    figures = {"time_ratio_script_over_ours": sum(b.values()) / total, "seconds_script": sum(b.values()), "seconds_ours": total}
    for part, (plain, own) in both.items():
        figures |= {f"{part}_seconds_script": plain, f"{part}_seconds_ours": own, f"{part}_ratio": plain / own}
    figures["share_of_scoring"] = scoring / total
    figures["texts_per_second"] = mine["scored_texts"] / scoring
    figures["lists_per_second"] = mine["scored_lists"] / a["scoring"]
    shown = ("fit_lists_per_second", "texts", "pairs", "prompt_tokens", "answer_tokens")
    figures |= {name: mine[name] for name in (*shown, *(name for name in mine if name.startswith("bytes_")))}
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=120, help="80 %% of them are training users")
    parser.add_argument("--samples", type=int, default=10, help="texts a user")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--trl-batch", type=int, default=1, help="a device's batch in TRL: 1 was the best of those that dpo.py tried")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="no file is written")
    parser.add_argument("--one", choices=("ours", "script"), help="one side in this process, with --folder")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(given.threads)
        say(ours(given) if given.one == "ours" else script(given))
        return 0
    runs: dict[str, list[Result]] = {"ours": [], "script": []}
    for _ in range(given.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for side, of in runs.items():
                of.append(fresh(__file__, ["--one", side, *sys.argv[1:], "--folder", folder], given.threads))
    mine, theirs = (min(of, key=lambda result: sum(result["seconds"].values())) for of in runs.values())
    figures = figures_of(mine, theirs)
    if not given.quick:
        seconds = {side: [sum(result["seconds"].values()) for result in of] for side, of in runs.items()}
        record("round", figures, {"ours": mine, "script": theirs, "seconds_of_each_run": seconds})
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
