"""Makes docs/benchmarks.md, and the result tables of README.md and docs/results.md, from benchmarks/results/*.json.

python benchmarks/table.py
"""

import re
from pathlib import Path
from typing import Any

from dpo4rec.evaluation.significance import holm
from dpo4rec.files import read_json
from dpo4rec.report.study import tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
NOT_RUN = """Not run on a GPU yet: `benchmarks/gpu/{script}`, which is to write `{name}.json`. Nothing is claimed of speed or memory there.
Only its tiny shape was run, on CPU (`--micro`). A machine with a GPU takes one part a command: `benchmarks/gpu/run.sh {part}`.
"""
ON_GPU = {"gpu_dpo": ("dpo.py", "lora8b"), "gpu_sampling": ("sampling.py", "sampling8b")}
SHOWN = ("ndcg@1", "ndcg@5", "ndcg@10", "map@5")


def benchmarks_page() -> str:
    """One table of figures for each result file."""
    parts = ["# Benchmarks\n\nMade by `python benchmarks/table.py` from `benchmarks/results/*.json`.\n"]
    missing = [name for name in ON_GPU if not (RESULTS / f"{name}.json").exists()]
    parts += [NOT_RUN.format(name=name, script=ON_GPU[name][0], part=ON_GPU[name][1]) for name in missing]
    for path in sorted(RESULTS.glob("*.json")):
        result = read_json(path)
        about = result["machine"]
        device = about.get("gpu", f"{about['cores']} cores")
        machine = f"{device}, {about['processor']}, torch {result['versions']['torch']}"
        lists = "".join(f", lists `{found}`" for found in sorted(hashes(result["raw"])))
        made = f"`{result['command']}`, {result['date'][:10]}, {machine}{lists}"
        parts.append(f"## {path.stem}\n\n{made}\n\n| figure | value |\n|---|---|")
        parts.append("\n".join(f"| {name} | {value:g} |" for name, value in result["figures"].items()) + "\n")
    return "\n".join(parts)


def hashes(raw: Any) -> set[str]:
    """The hashes of the candidate lists that a result was measured on: two results compare only where they agree."""
    if isinstance(raw, list):
        return {found for value in raw for found in hashes(value)}
    if not isinstance(raw, dict):
        return set()
    own = {value for name, value in raw.items() if name in ("lists_hash", "candidates_hash") and isinstance(value, str)}
    return own | {found for value in raw.values() for found in hashes(value)}


def result_table(results: dict[str, Any]) -> str:
    """A run's metrics by condition, and its comparisons, as Markdown."""
    lines = ["| condition | " + " | ".join(name.upper() for name in SHOWN) + " |", "|---|" + "---|" * len(SHOWN)]
    lines += [f"| {label} | " + " | ".join(f"{values[name]:.4f}" for name in SHOWN) + " |" for label, values in results["metrics"].items()]
    lines += ["", "| difference in NDCG@5 | mean [95 % interval] | p | p (Holm) |", "|---|---|---|---|"]
    rows = [row for row in results["comparisons"] if row["metric"] == "ndcg@5"]
    for row, corrected in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        interval = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        lines.append(f"| {row['a']} − {row['b']} | {interval} | {row['p_value']:.4f} | {corrected:.4f} |")
    return "\n".join(lines)


def readme_results() -> str:
    result = read_json(RESULTS / "ml_1m.json")
    results, figures = result["raw"]["results"], result["figures"]
    chosen = results["temperatures"]["chosen"]
    said = (
        f"MovieLens-1M, popularity-weighted negatives, built-in tiny model, PRM, two rounds, {figures['minutes']:g} minutes on a machine "
        f"of {result['machine']['cores']} CPU cores; {results['test_users']} test users, {results['seeds']} recommender seeds, lists "
        f"`{results['lists_hash']}`; temperatures chosen on validation: untuned {chosen['untuned']:g}, tuned {chosen['tuned']:g}. "
        f"Well-formed texts: {figures['well_formed_untuned']:.1%} untuned, {figures['well_formed_tuned']:.1%} tuned."
    )
    return f"{said}\n\n{result_table(results)}"


def study_results() -> str:
    result = read_json(RESULTS / "experiment.json")
    return tables(result["raw"])


MARKED = {"README.md": readme_results, "docs/results.md": study_results}
"""What stands between the lines `<!-- results -->` and `<!-- /results -->` of a page."""


def main() -> None:
    (ROOT / "docs" / "benchmarks.md").write_text(benchmarks_page(), encoding="utf-8")
    block = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
    for name, made in MARKED.items():
        page, content = ROOT / name, made()
        text = page.read_text(encoding="utf-8")
        page.write_text(block.sub(lambda found, content=content: f"{found[1]}{content.rstrip()}\n{found[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
