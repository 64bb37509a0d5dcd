"""The experiment on MovieLens-1M: does the alignment help? `dpo4rec reproduce ml-1m-dpo4rec`, and its figures for the record.

    python benchmarks/experiment.py data/ml-1m runs/ml-1m-dpo4rec

The folder is made, or continued; with `--so-far` it is left as it is, and what is finished is recorded.
Every test user's values go to benchmarks/results/experiment/, beside those of seeds that are there already, and the tables
of all of them are the raw part of benchmarks/results/experiment.json.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.record import RESULTS, record
from dpo4rec.study import Study, load_study
from dpo4rec.study_results import keep_evaluations, study_results

KEPT = RESULTS / "experiment"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--so-far", action="store_true")
    given = parser.parse_args()
    options = ["ml-1m-dpo4rec", "--data", str(given.data), "--run-dir", str(given.run_dir)]
    status = 0  # 1 may be a figure that is not as expected: it is recorded all the same
    if not given.so_far:
        status = subprocess.run([sys.executable, "-m", "dpo4rec.cli", "reproduce", *options], check=False).returncode
    config, settings = load_study("ml-1m-dpo4rec"), [f"data.folder={given.data}"]
    keep_evaluations(Study(config, given.run_dir, settings), KEPT)
    results = study_results(Study(config, KEPT, settings))
    record("experiment", results["figures"], results)
    return status


if __name__ == "__main__":
    sys.exit(main())
