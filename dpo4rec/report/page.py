"""A finished run on one page, `report.html`: what was compared, on whom, by which texts. It needs nothing but a browser.

All that comes from data or settings is escaped, and the page may load and run nothing.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from dpo4rec import files
from dpo4rec.conditions import POLICIES
from dpo4rec.data.user_rows import UserRows
from dpo4rec.experiment import Experiment
from dpo4rec.files import read_json, read_parquet, stable_seed
from dpo4rec.report.charts import curves, intervals
from dpo4rec.report.table import SHOWN
from dpo4rec.run_folder import CONFIG, read_yaml

EXAMPLES = 8
"""Users whose texts are shown."""
FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; --first: #2563b0; --second: #c2571a; --faint: #8886 }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: .15em .7em; border-bottom: 1px solid var(--faint); text-align: right; vertical-align: top }}
th:first-child, td:first-child, .texts td {{ text-align: left }}
svg {{ max-width: 100%; height: auto }}
svg text {{ font-size: 12px; fill: currentColor }}
svg line, svg polyline {{ fill: none; stroke: var(--first); stroke-width: 2 }}
svg .second {{ stroke: var(--second) }}
svg .zero {{ stroke: var(--faint); stroke-width: 1 }}
svg .dot, svg .first-name {{ fill: var(--first) }}
svg .second-name {{ fill: var(--second) }}
pre {{ white-space: pre-wrap }}
</style></head><body>
{body}
</body></html>
"""


def write_report(experiment: Experiment) -> Path:
    """Writes `report.html` into the folder of an evaluated run and returns its path.

    Raises:
        InputError: the run is not evaluated.
    """
    run, results = experiment.run.folder, read_json(experiment.folder / "results.json")
    title = f"dpo4rec: {run.path.name}"
    sections = {
        title: _about(experiment, results),
        "Does the text help?": _comparisons(results),
        "All conditions": _conditions(results),
        "Texts of the test users": _texts(results) + _temperatures(results),
        "Rounds": _rounds(experiment, results),
        f"{EXAMPLES} users drawn at random": _examples(experiment, results),
        "How it was made": _made(run.manifest, run.path),
    }
    body = "\n".join(f"<h2>{escape(heading)}</h2>{content}" for heading, content in sections.items())
    out = run / "report.html"
    with files.atomic(out) as partial:
        partial.write_text(FRAME.format(title=escape(title), body=body), encoding="utf-8")
    return out


def _about(experiment: Experiment, results: dict[str, Any]) -> str:
    config = experiment.config
    chosen = ", ".join(f"{policy} {temperature:g}" for policy, temperature in results["temperatures"]["chosen"].items())
    rows = [
        ("data", f"{config.data.source}, {config.data.negatives} negatives, lists {results['lists_hash']}"),
        ("test users", f"{results['test_users']}, read once, after everything was chosen on validation users"),
        (
            "language model",
            f"{config.llm.name}, {config.rounds} rounds ({config.alignment.method}), {config.sampling.samples} texts a user",
        ),
        ("recommender", f"{config.recommender.model}, {results['seeds']} seeds a condition; one seed of the whole run ({config.seed})"),
        ("temperatures", f"{chosen} (each the best on validation users)"),
    ]
    return _table(["", ""], rows, "texts")


def _comparisons(results: dict[str, Any]) -> str:
    rows = [row for row in results["comparisons"] if row["metric"] == "ndcg@5"]
    p_values = [f"p = {row['p_value']:.4f}, corrected {row['p_value_holm']:.4f}" for row in rows]
    names = [f"{row['a']} − {row['b']}" for row in rows]
    shown = [(name, row["low"], row["difference"], row["high"], p) for name, row, p in zip(names, rows, p_values, strict=True)]
    note = """<p>Differences in NDCG@5 with 95 % intervals: paired bootstrap over the test users of this one run; p-values as they are, and
    corrected for their number (Holm). "Shared recommender" ranks by the texts of both policies with one recommender.</p>"""
    return note + intervals(shown)


def _conditions(results: dict[str, Any]) -> str:
    rows = [(label, *(f"{values[name]:.4f}" for name in SHOWN)) for label, values in results["metrics"].items()]
    return _table(["condition", *(name.upper() for name in SHOWN)], rows)


def _texts(results: dict[str, Any]) -> str:
    names = {"well_formed": "well-formed", "distinct": "distinct", "grounded": "grounded claims", "mean_tokens": "tokens"}
    rows = [(policy, *(f"{of[name]:.3f}" if name in of else "" for name in names)) for policy, of in results["texts"].items()]
    return _table(["policy", *names.values()], rows)


def _temperatures(results: dict[str, Any]) -> str:
    found = results["temperatures"]["validation_ndcg@5"]
    if not found:
        return ""
    series = {policy: [(float(t), value) for t, value in found[policy].items()] for policy in POLICIES}
    return f"<p>NDCG@5 of validation users by temperature, of which the best was taken:</p>{curves(series, 'temperature')}"


def _rounds(experiment: Experiment, results: dict[str, Any]) -> str:
    parts = []
    for number, of in enumerate(results["rewards"]):
        facts = [f"{of['pairs'].get('pairs', 0)} pairs of {of['texts']} texts"]
        if "mean" in (true := of.get("rank_correlation_with_truth", {})):
            facts.append(f"rewards follow the simulated users' true preferences with Spearman's {true['mean']:.3f}")
        parts.append(f"<h3>Round {number}</h3><p>{escape('; '.join(facts))}.</p>")
        lines = [json.loads(line) for line in _lines(experiment.run.folder / f"round-{number}" / "adapter" / "training_log.jsonl")]
        if len(lines) > 1:
            parts.append(curves({"loss": _smooth([(line["step"], line["loss"]) for line in lines])}, "step"))
    return "".join(parts)


def _examples(experiment: Experiment, results: dict[str, Any]) -> str:
    """Drawn by a hash of their ids, so neither the best nor the worst."""
    values = read_parquet(experiment.folder / "per_user.parquet", ["user_id", "condition", "ndcg@5"]).to_pylist()
    ndcg = {(row["user_id"], row["condition"]): row["ndcg@5"] for row in values}
    users = sorted({user for user, _ in ndcg}, key=lambda user: stable_seed("report", user))[:EXAMPLES]
    chosen, run = results["temperatures"]["chosen"], experiment.run
    texts = {policy: _first_texts(run.folder / experiment.texts_of(policy, "test", chosen[policy]), users) for policy in POLICIES}
    prompts = {row["user_id"]: row["prompt"] for row in UserRows(run.prompts).read(users).to_pylist()}
    parts = []
    for user in users:
        rows = [(policy, texts[policy].get(user, ""), f"{ndcg[user, f'{policy} text']:.4f}") for policy in POLICIES]
        table = _table(["policy", "text", "NDCG@5"], rows, "texts")
        parts.append(f"<details><summary>user {escape(user)}</summary><pre>{escape(prompts[user])}</pre>{table}</details>")
    return f"<p>The first text of each policy; NDCG@5 is the mean over all of a user's texts and lists.</p>{''.join(parts)}"


def _first_texts(folder: Path, users: list[str]) -> dict[str, str]:
    parts = [UserRows(part).read(users) for part in sorted((folder / "samples").glob("*.parquet")) if not files.is_empty(part)]
    rows = [row for part in parts for row in part.to_pylist()]
    return {row["user_id"]: row["text"] for row in rows if row["sample"] == 0}


def _made(manifest: dict[str, Any], folder: Path) -> str:
    stages = [(name, f"{stage['seconds']:.1f}") for name, stage in manifest["stages"].items() if "seconds" in stage]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    settings = yaml.safe_dump(read_yaml(folder / CONFIG), sort_keys=False, allow_unicode=True)
    return (
        f"<p>{escape(versions)}</p><details><summary>stages, seconds</summary>{_table(['stage', 'seconds'], stages)}</details>"
        f"<details><summary>settings</summary><pre>{escape(settings)}</pre></details>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{head}</tr>{body}</table>'


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _smooth(points: list[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """Means of neighbours, so that at most so many are left."""
    size = -(-len(points) // most)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
