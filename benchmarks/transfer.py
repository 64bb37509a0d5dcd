"""Do tuned texts serve recommenders that have not rewarded them? Every re-ranker, on tuned and on untuned texts, on lists of any kind.

    python benchmarks/transfer.py frozen runs/study/seed-0/DPO-round-2 runs/transfer --set data.negatives=uniform
    python benchmarks/transfer.py retrieved runs/study/seed-0/DPO-round-2 runs/transfer --set 'retrieved.file=candidates.parquet' ...

The first folder is an evaluated run, whose texts are used; the second is made, or continued. Writes
benchmarks/results/transfer_<protocol>.json.
"""

from pathlib import Path

from benchmarks.controls import Pairs, Signals, measure
from dpo4rec.files import read_json, write_parquet
from dpo4rec.knowledge.user_texts import read_user_texts
from dpo4rec.run_folder import read_yaml

SIGNALS: Signals = {
    "untuned": ("text", True, "untuned"),
    "tuned": ("text", True, "tuned"),
    "history+untuned": ("history+text", True, "untuned"),
    "history+tuned": ("history+text", True, "tuned"),
}
COMPARED: Pairs = (("tuned", "untuned"), ("history+tuned", "history+untuned"))


def write_texts(source: Path, data: Path, out: Path, seed: int) -> None:
    """Each policy's texts of the users that are learned from, and at its own temperature of the test users."""
    chosen = read_json(source / "evaluation" / "temperatures.json")["chosen"]
    for policy, round_ in (("untuned", 0), ("tuned", read_yaml(source / "config.yaml")["rounds"])):
        folders = [
            source / f"round-{round_}" / "samples",
            source / "evaluation" / "texts" / f"{policy}-test-t{chosen[policy]:g}" / "samples",
        ]
        write_parquet(read_user_texts(folders), out / f"{policy}.parquet")


if __name__ == "__main__":
    measure("transfer", __doc__, write_texts, SIGNALS, COMPARED)
