"""The experiment on MovieLens-1M: does the alignment help? `dpo4rec reproduce ml-1m-dpo4rec`, and its figures for the record.

    python benchmarks/experiment.py data/ml-1m runs/ml-1m-dpo4rec

The folder is made, or continued; with `--so-far` it is left as it is, and the seeds that are finished are recorded.
Writes benchmarks/results/experiment.json, with the study's tables as its raw part.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.record import record
from dpo4rec.files import read_json
from dpo4rec.study import Study, load_study


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--so-far", action="store_true")
    given = parser.parse_args()
    options = ["ml-1m-dpo4rec", "--data", str(given.data), "--run-dir", str(given.run_dir)]
    if given.so_far:
        status, results = 0, Study(load_study("ml-1m-dpo4rec"), given.run_dir, [f"data.folder={given.data}"]).results()
    else:  # status 1 may be a figure that is not as expected: it is recorded all the same
        status = subprocess.run([sys.executable, "-m", "dpo4rec.cli", "reproduce", *options], check=False).returncode
        results = read_json(given.run_dir / "results.json")
    record("experiment", results["figures"], results)
    return status


if __name__ == "__main__":
    sys.exit(main())
