"""Re-rankers on what a first stage retrieved, against the retriever's own order: MovieLens-1M, leave-one-out, all users.

    python benchmarks/retrieved.py ml-1m-folder runs/retrieved

Reads retrieved_candidates.parquet of the folder (the rows of its `sasrec` retriever: 100 items a user). The run folder is made, or
continued. Writes benchmarks/results/retrieved.json.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.record import record
from dpo4rec.files import read_json

MODELS = ("prm", "dlcm", "setrank", "mir")
LEARNED = ("loss=softmax", "selection_cutoff=10", "epochs=4", "batch_size=32", "learning_rate=1e-3")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    given = parser.parse_args()
    command = [sys.executable, "-m", "dpo4rec.cli"]
    settings = ["data.max_users=null", "cluster.threads_per_worker=1", "cluster.training_threads=1", "retrieved.rows.retriever=sasrec"]
    settings += [f"retrieved.file={given.data / 'retrieved_candidates.parquet'}", "recommender.user_signal=history"]
    settings += ["recommender.item_text=false", *(f"recommender.{setting}" for setting in LEARNED)]
    words = [word for setting in settings for word in ("--set", setting)]
    for model in MODELS:
        place = ["--preset", "ml-1m", "--data", str(given.data), "--lists", "retrieved"]
        subprocess.run([*command, "fit", str(given.run_dir), "--model", model, *place, *words], check=True)
    subprocess.run([*command, "evaluate", str(given.run_dir)], check=True)
    summary = read_json(given.run_dir / "evaluation" / "retrieved" / "summary.json")
    figures: dict[str, float] = {f"ndcg@10 {name}": round(of["ndcg@10"], 4) for name, of in summary["metrics"].items()}
    for row in summary["comparisons"]:
        if row["a"] in MODELS:
            figures |= {f"{row['a']} - {row['b']}": round(row["difference"], 4), f"p {row['a']} (Holm)": row["p_value_holm"]}
    figures |= {
        "share_with_target": round(summary["share_with_target"], 4),
        "test_users": summary["users"],
        "seeds": summary["seeds"]["prm"],
    }
    record("retrieved", figures, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
