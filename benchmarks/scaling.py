"""The cost model of docs/scaling.md: `python benchmarks/scaling.py` reads benchmarks/results/*.json and writes the page's tables.

Formulas are functions of `Inputs`; the page names them. Nothing on the page is typed by hand that a result file has.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from dpo4rec.errors import InputError
from dpo4rec.files import read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "scaling.md"
GPUS = (8, 64, 512)
HOUR, GIB = 3600, 2**30

MEASURED = {
    "texts_per_second": ("round", "texts_per_second", "texts encoded and scored, 2 cores"),
    "fit_lists_per_second": ("round", "fit_lists_per_second", "lists x epochs of a recommender's fit, one process"),
    "bytes_per_user_prompts": ("round", "bytes_per_user_prompts", "of the prompts table"),
    "bytes_per_text": ("round", "bytes_per_text", "text, token ids, vector and score of a text"),
    "bytes_per_pair": ("round", "bytes_per_pair", "of the pairs table"),
    "measured_answer_tokens": ("round", "answer_tokens", "of the texts whose bytes these are"),
    "busy_share": ("simulated_cluster", "busy_share_64", "of 64 workers' time, start-up left out"),
    "driver_seconds_per_unit": ("simulated_cluster", "driver_cpu_seconds_per_unit", "the driver's processor time for a unit"),
    "driver_bytes_per_user": ("scale_memory", "bytes_per_user_chain", "growth of the driver's peak memory in a round, workers included"),
    "scorer_bytes_per_user": ("scale_memory", "bytes_per_user_chain", "growth of a worker's peak memory, the driver's included"),
}
"""Input -> result file, figure, meaning."""

ASSUMED = {
    "tokens_per_second": (12_500, "one H100, an 8B model in vLLM (public figure); no GPU was at hand"),
    "pairs_per_second": (23.9 / 8, "one H100 of 8, an 8B model, prompts shared by both answers (arXiv 2410.20305)"),
    "training_gpus_at_most": (64, "each optimizer step has 64 pairs or so, and a GPU needs one at least"),
    "cores_per_gpu": (8, "processor cores beside each GPU, which encode, score and fit"),
    "samples": (10, "texts a user in a round"),
    "answer_tokens": (200, "tokens of a text"),
    "lists": (8, "lists a user"),
    "folds": (2, "reward.folds"),
    "epochs": (5, "recommender.epochs"),
    "users_per_unit": (32, "sampling.users_per_unit"),
    "alignment_users": (200_000, "users of a round; published DPO runs have 10,000 to 100,000 pairs"),
    "all_users": (100_000_000, "users who are served"),
    "daily_share": (0.1, "users whose history changes in a day"),
    "adapter_bytes": (168e6, "LoRA of rank 16 on all linear layers of an 8B model, 42 million numbers in fp32"),
    "driver_gib": (64, "memory of the driver's machine"),
    "worker_gib": (16, "memory of a worker, two or three of which share a processor's"),
    "disk_bytes": (10e12, "shared disk"),
    "hashed_bytes_per_second": (1e9, "SHA-256 of the files of a finished stage, by one process of the driver"),
    "files_in_folder": (1e6, "files of a folder that shared file systems list in seconds"),
}
"""Input -> value, where it is from."""


@dataclass(frozen=True)
class Inputs:
    """What the model is fed with: see MEASURED and ASSUMED for the meaning of each."""

    texts_per_second: float
    fit_lists_per_second: float
    bytes_per_user_prompts: float
    bytes_per_text: float
    bytes_per_pair: float
    measured_answer_tokens: float
    busy_share: float
    driver_seconds_per_unit: float
    driver_bytes_per_user: float
    scorer_bytes_per_user: float
    tokens_per_second: float
    pairs_per_second: float
    training_gpus_at_most: float
    cores_per_gpu: float
    samples: float
    answer_tokens: float
    lists: float
    folds: float
    epochs: float
    users_per_unit: float
    alignment_users: float
    all_users: float
    daily_share: float
    adapter_bytes: float
    driver_gib: float
    worker_gib: float
    disk_bytes: float
    hashed_bytes_per_second: float
    files_in_folder: float


def read() -> Inputs:
    """Raises `InputError` when a benchmark has not been run."""
    figures = {name: read_json(RESULTS / f"{name}.json")["figures"] for name in sorted({file for file, _, _ in MEASURED.values()})}
    measured = {name: figures[file][key] for name, (file, key, _) in MEASURED.items()}
    return Inputs(**measured, **{name: value for name, (value, _) in ASSUMED.items()})


def sampling_seconds(of: Inputs, users: float, samples: float, gpus: float) -> float:
    return users * samples * of.answer_tokens / (gpus * of.tokens_per_second * of.busy_share)


def scoring_seconds(of: Inputs, users: float, samples: float, gpus: float) -> float:
    """Encoding is in it. The rate is that of 2 cores."""
    return users * samples / (of.texts_per_second * gpus * of.cores_per_gpu / 2)


def fit_seconds(of: Inputs, users: float) -> float:
    """All fits side by side, each in one process: more machines do not make it shorter."""
    return users * of.lists * (of.folds - 1) / of.folds * of.epochs / of.fit_lists_per_second


def alignment_seconds(of: Inputs, users: float, gpus: float) -> float:
    """One pair a user."""
    return users / (min(gpus, of.training_gpus_at_most) * of.pairs_per_second)


def user_bytes(of: Inputs, samples: float) -> float:
    """Bytes that a round writes for a user; each is read once by the next stage. Bytes of a text grow with its tokens at most."""
    text = of.bytes_per_text * max(1.0, of.answer_tokens / of.measured_answer_tokens)
    return of.bytes_per_user_prompts + samples * text + of.bytes_per_pair


def round_bytes(of: Inputs, users: float, samples: float) -> float:
    """Bytes written in a round."""
    return users * user_bytes(of, samples) + of.adapter_bytes


def store_bytes(of: Inputs, gpus: float, units_in_flight: float = 2) -> float:
    """Prompts that wait in the object store, which is all that goes through it: texts go to files."""
    return gpus * units_in_flight * of.users_per_unit * of.bytes_per_user_prompts


def gpus_of_a_driver(of: Inputs, samples: float) -> float:
    """GPUs that one driver keeps supplied with units."""
    unit_seconds = of.users_per_unit * samples * of.answer_tokens / of.tokens_per_second
    return unit_seconds / of.driver_seconds_per_unit


def limits(of: Inputs, gpus: int) -> list[tuple[str, float]]:
    """What a round meets, and at how many users, fewest first."""
    day = 24 * HOUR

    def users_in(size: float) -> float:
        """Users for whom a round writes so many bytes."""
        return (size - of.adapter_bytes) / user_bytes(of, of.samples)

    found = {
        "a fit takes longer than a day (one process a fit)": day / fit_seconds(of, 1),
        f"sampling takes longer than a day on {gpus} GPUs": day / sampling_seconds(of, 1, of.samples, gpus),
        f"the driver's {of.driver_gib:g} GiB": of.driver_gib * GIB / max(1.0, of.driver_bytes_per_user),
        f"a scorer's {of.worker_gib:g} GiB": of.worker_gib * GIB / max(1.0, of.scorer_bytes_per_user),
        f"{of.files_in_folder:,.0f} unit files in a folder": of.files_in_folder * of.users_per_unit,
        "hashing what a round wrote takes the driver longer than an hour": users_in(HOUR * of.hashed_bytes_per_second),
        f"{of.disk_bytes / 1e12:g} TB of disk for one round": users_in(of.disk_bytes),
    }
    return sorted(found.items(), key=lambda row: row[1])


def cost_table(of: Inputs) -> str:
    """Hours of each job by number of GPUs."""
    aligned, served = of.alignment_users, of.all_users
    changed = served * of.daily_share
    rows = {
        f"round of {aligned:,.0f} users: sampling": lambda g: sampling_seconds(of, aligned, of.samples, g),
        "... encoding and scoring": lambda g: scoring_seconds(of, aligned, of.samples, g),
        "... fitting the recommenders": lambda g: fit_seconds(of, aligned),
        "... alignment": lambda g: alignment_seconds(of, aligned, g),
        f"a text and a vector for each of {served:,.0f} users": lambda g: (
            sampling_seconds(of, served, 1, g) + scoring_seconds(of, served, 1, g)
        ),
        f"the same for the {changed:,.0f} of a day": lambda g: sampling_seconds(of, changed, 1, g) + scoring_seconds(of, changed, 1, g),
        f"a round of all {served:,.0f} users: sampling": lambda g: sampling_seconds(of, served, of.samples, g),
        "... fitting the recommenders on all of them": lambda g: fit_seconds(of, served),
    }
    lines = ["| hours | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " |", "|---|" + "---|" * len(GPUS)]
    lines += [f"| {name} | " + " | ".join(f"{cost(g) / HOUR:,.2f}" for g in GPUS) + " |" for name, cost in rows.items()]
    share = f"A round needs texts of {aligned / served:.1%} of the users, {of.samples:g} each; serving needs one of every user."
    return "\n".join([*lines, "", share])


def bytes_table(of: Inputs) -> str:
    rows = {
        f"round of {of.alignment_users:,.0f} users": round_bytes(of, of.alignment_users, of.samples),
        f"a text and a vector for each of {of.all_users:,.0f} users": round_bytes(of, of.all_users, 1),
        f"a round of all {of.all_users:,.0f} users": round_bytes(of, of.all_users, of.samples),
    }
    return "\n".join(["| gigabytes written | |", "|---|---|", *(f"| {name} | {value / 1e9:,.1f} |" for name, value in rows.items())])


def limits_table(of: Inputs) -> str:
    lines = ["| what a round meets | at users |", "|---|---|"]
    lines += [f"| {name} | {users:,.0f} |" for name, users in limits(of, GPUS[-1])]
    lines += ["", "| one driver | |", "|---|---|"]
    kinds = {f"{of.samples:g} texts a user (a round)": of.samples, "1 text a user (serving)": 1.0}
    rows = {
        f"supplies with units of {of.users_per_unit:g} users, {name}, so many GPUs": gpus_of_a_driver(of, n) for name, n in kinds.items()
    }
    rows[f"has so many MB in the object store, 2 units for each of {GPUS[-1]} GPUs"] = store_bytes(of, GPUS[-1]) / 1e6
    return "\n".join(lines + [f"| {name} | {value:,.1f} |" for name, value in rows.items()])


def inputs_table(of: Inputs) -> str:
    lines = ["| input | value | where from |", "|---|---|---|"]
    lines += [
        f"| {name} | {getattr(of, name):,.4g} | measured: `{file}.json` `{key}`; {what} |" for name, (file, key, what) in MEASURED.items()
    ]
    return "\n".join(lines + [f"| {name} | {value:,.4g} | assumption: {why} |" for name, (value, why) in ASSUMED.items()])


def filled(text: str, of: Inputs) -> str:
    """The page with the tables between its markers made anew."""
    tables = {"inputs": inputs_table, "costs": cost_table, "bytes": bytes_table, "limits": limits_table}
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda found, table=table: f"{found[1]}{table(of)}\n{found[2]}", text)
    return text


def main() -> int:
    try:
        inputs = read()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), inputs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
