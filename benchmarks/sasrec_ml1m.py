"""SASRec, and GRU4Rec with the same loss, on MovieLens-1M: 5-core, leave-one-out, whole catalogue, several seeds.

    python benchmarks/sasrec_ml1m.py ml-1m-folder runs/sasrec

Each model has a run folder and a thread of its own, and is fitted one seed after the other; the folders are made, or continued. Writes
benchmarks/results/sasrec_ml1m.json; `minutes` is the time of all of SASRec's fits, validation included.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.record import record
from dpo4rec.files import read_json

MODELS: dict[str, list[str]] = {
    "sasrec": [],
    "gru4rec": ["sequential.layers=2", "sequential.embedding_dim=64", "sequential.epochs=16", "evaluation.seeds=2"],
}
"""Each with what it changes of the preset; the second is there for comparison, and a seed of it takes a quarter of an hour."""


def fitted(model: str, data: Path, folder: Path) -> dict[str, Any]:
    """Fits a model, evaluates it, and returns its fits, their histories and the summary of its metrics."""
    command, settings = [sys.executable, "-m", "dpo4rec.cli"], ["--preset", "sasrec-ml-1m", "--data", str(data)]
    settings += [word for setting in MODELS[model] for word in ("--set", setting)]
    subprocess.run([*command, "fit", str(folder), "--model", model, *settings], check=True)
    subprocess.run([*command, "evaluate", str(folder)], check=True)
    fits = read_json(folder / "manifest.json")["stages"][f"recommenders/{model}/fit"]["report"]["fits"]
    return {
        "fits": fits,
        "histories": [read_json(folder / "recommenders" / model / "models" / fit["out"] / "history.json")["history"] for fit in fits],
        "summary": read_json(folder / "evaluation" / "catalogue" / "summary.json"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    given = parser.parse_args()
    with ThreadPoolExecutor() as pool:
        found = dict(zip(MODELS, pool.map(lambda model: fitted(model, given.data, given.run_dir / model), MODELS), strict=True))
    summaries = {model: of["summary"] for model, of in found.items()}
    fits = {model: of["fits"] for model, of in found.items()}
    figures: dict[str, float] = {}
    for model, prefix in (("sasrec", ""), ("gru4rec", "gru4rec_")):
        for metric in ("ndcg@10", "hr@10"):
            figures[f"{prefix}{metric}"] = round(summaries[model]["metrics"][model][metric], 4)
            figures[f"{prefix}{metric}_deviation"] = round(summaries[model]["deviations"][model][metric], 4)
        figures[f"{prefix}seeds"] = len(fits[model])
        figures[f"{prefix}minutes"] = round(sum(fit["seconds"] for fit in fits[model]) / 60, 1)
    figures |= {
        "test_users": summaries["sasrec"]["users"],
        "ndcg@10 popularity": round(summaries["sasrec"]["metrics"]["popularity"]["ndcg@10"], 4),
    }
    record("sasrec_ml1m", figures, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
