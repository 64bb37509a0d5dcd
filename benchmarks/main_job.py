"""Runs the main job from nothing, with its time, and records its result.

    python benchmarks/main_job.py quickstart runs/quickstart -- --preset quickstart
    python benchmarks/main_job.py ml_1m runs/ml-1m -- --preset ml-1m --data data/ml-1m

Writes benchmarks/results/<name>.json; the raw part is the run's results.json and the seconds of each stage.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.interruptions import command, split_at_dashes
from benchmarks.record import record
from dpo4rec.files import read_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("run_dir", type=Path, help="must not exist: the time of a continued run means nothing")
    own, options = split_at_dashes(sys.argv[1:])
    given = parser.parse_args(own)
    if given.run_dir.exists():
        parser.error(f"{given.run_dir} is there already")
    begun = time.monotonic()
    subprocess.run(command(given.run_dir, options), check=True)
    minutes = (time.monotonic() - begun) / 60
    results, stages = read_json(given.run_dir / "evaluation" / "results.json"), read_json(given.run_dir / "manifest.json")["stages"]
    compared = {f"{row['a']} - {row['b']}": row for row in results["comparisons"] if row["metric"] == "ndcg@5"}
    main_row, shared = compared["tuned text - untuned text"], compared["tuned text, shared recommender - untuned text, shared recommender"]
    figures = {
        "minutes": round(minutes, 1),
        "test_users": results["test_users"],
        "seeds": results["seeds"],
        **{f"ndcg@5 {label}": round(values["ndcg@5"], 4) for label, values in results["metrics"].items()},
        "delta_ndcg5_tuned_vs_untuned": round(main_row["difference"], 4),
        "p_tuned_vs_untuned": main_row["p_value"],
        "delta_ndcg5_tuned_vs_untuned_shared_recommender": round(shared["difference"], 4),
        "p_tuned_vs_untuned_shared_recommender": shared["p_value"],
        "well_formed_tuned": round(results["texts"]["tuned"]["well_formed"], 4),
        "well_formed_untuned": round(results["texts"]["untuned"]["well_formed"], 4),
    }
    correlations = [of["rank_correlation_with_truth"]["mean"] for of in results["rewards"] if "rank_correlation_with_truth" in of]
    figures |= {f"rank_correlation_with_truth_round_{i}": round(value, 4) for i, value in enumerate(correlations)}
    record(given.name, figures, {"results": results, "seconds": {name: stage["seconds"] for name, stage in stages.items()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
