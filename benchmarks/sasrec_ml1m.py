"""SASRec, and GRU4Rec with the same loss, on MovieLens-1M: 5-core, leave-one-out, whole catalogue, several seeds.

    python benchmarks/sasrec_ml1m.py ml-1m-folder runs/sasrec

The run folder is made, or continued. Writes benchmarks/results/sasrec_ml1m.json; `minutes` is the time of all of SASRec's fits one after
another, validation included.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.record import record
from dpo4rec.files import read_json

MODELS: dict[str, list[str]] = {"sasrec": [], "gru4rec": ["sequential.embedding_dim=64", "sequential.epochs=12"]}
"""Each with what it changes of the preset."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    given = parser.parse_args()
    command = [sys.executable, "-m", "dpo4rec.cli"]
    for model, own in MODELS.items():
        settings = ["--preset", "sasrec-ml-1m", "--data", str(given.data), *(word for setting in own for word in ("--set", setting))]
        subprocess.run([*command, "fit", str(given.run_dir), "--model", model, *settings], check=True)
    subprocess.run([*command, "evaluate", str(given.run_dir)], check=True)
    summary = read_json(given.run_dir / "evaluation" / "catalogue" / "summary.json")
    stages = read_json(given.run_dir / "manifest.json")["stages"]
    fits = {model: stages[f"recommenders/{model}/fit"]["report"]["fits"] for model in MODELS}
    histories = {
        model: [
            read_json(given.run_dir / "recommenders" / model / "models" / fit["out"] / "history.json")["history"] for fit in fits[model]
        ]
        for model in MODELS
    }
    figures: dict[str, float] = {}
    for model, prefix in (("sasrec", ""), ("gru4rec", "gru4rec_")):
        for metric in ("ndcg@10", "hr@10"):
            figures[f"{prefix}{metric}"] = round(summary["metrics"][model][metric], 4)
            figures[f"{prefix}{metric}_deviation"] = round(summary["deviations"][model][metric], 4)
        figures[f"{prefix}minutes"] = round(sum(fit["seconds"] for fit in fits[model]) / 60, 1)
    figures |= {
        "seeds": len(fits["sasrec"]),
        "test_users": summary["users"],
        "ndcg@10 popularity": round(summary["metrics"]["popularity"]["ndcg@10"], 4),
    }
    record("sasrec_ml1m", figures, {"fits": fits, "histories": histories, "summary": summary})
    return 0


if __name__ == "__main__":
    sys.exit(main())
