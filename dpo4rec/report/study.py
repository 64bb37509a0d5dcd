"""The tables of a study, as Markdown: for the terminal, for `results.md` and for the documentation."""

from collections import Counter
from typing import Any

METRICS = ("ndcg@5", "ndcg@10", "map@5")
TEXTS = {"well_formed": "well-formed", "distinct": "distinct", "grounded": "grounded", "mean_tokens": "tokens"}


def tables(results: dict[str, Any]) -> str:
    """Conditions with the standard deviation over seeds, comparisons, the same of arms with one recommender, ablations, and the figures."""
    seeds = f"{results['seeds']} of {results['of_seeds']}" if results["seeds"] < results["of_seeds"] else results["seeds"]
    heading = f"Test users: {results['test_users']}. Seeds of the whole loop: {seeds}. Lists: `{results['lists_hash']}`."
    if results["seeds"] == 1:
        heading += " Of one run, intervals and p-values are over its users alone: another run may differ by more."
    conditions = [["condition", *(metric.upper() for metric in METRICS), *TEXTS.values(), "temperatures"]]
    for label, of in results["conditions"].items():
        texts = of.get("texts", {})
        conditions.append(
            [label, *(_with_deviation(of, metric) for metric in METRICS), *(_text(texts, name) for name in TEXTS), _temperatures(of)]
        )
    comparisons = [["difference in NDCG@5", "mean", "95 % interval", "p", "p (Holm)"]]
    for row in results["comparisons"]:
        comparisons.append(
            [f"{row['a']} - {row['b']}", *_difference(row), f"{row['p_value_holm']:.4f}" if "p_value_holm" in row else "exploratory"]
        )
    shared = [["one recommender for both", "tuned", "untuned", "mean", "95 % interval", "p"]]
    shared += [[arm, *_means(row), *_difference(row)] for arm, row in results["one recommender"].items()]
    ablations = [["variant, one seed", "tuned", "untuned", "mean", "95 % interval", "p", "beside a history: mean", "95 % interval", "p"]]
    for label, row in results["ablations"].items():
        ablations.append([label, *_means(row), *_difference(row), *_difference(row["beside a history"])])
    figures = [["figure", "value"], *([name, f"{value:g}"] for name, value in results["figures"].items())]
    return "\n\n".join([heading, *(_markdown(table) for table in (conditions, comparisons, shared, ablations, figures))]) + "\n"


def _means(row: dict[str, Any]) -> list[str]:
    return [f"{row['tuned']:.4f}", f"{row['untuned']:.4f}"]


def _difference(row: dict[str, Any]) -> list[str]:
    """Mean, interval, p."""
    return [f"{row['difference']:+.4f}", f"[{row['low']:+.4f}, {row['high']:+.4f}]", f"{row['p_value']:.4f}"]


def _with_deviation(of: dict[str, Any], metric: str) -> str:
    deviation = of.get(f"{metric} deviation")
    return f"{of[metric]:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")


def _text(texts: dict[str, float], name: str) -> str:
    return "" if name not in texts else f"{texts[name]:.1f}" if name == "mean_tokens" else f"{texts[name]:.3f}"


def _temperatures(of: dict[str, Any]) -> str:
    """Which were chosen, by how many seeds."""
    counts = Counter(of.get("temperatures", []))
    return ", ".join(f"{value:g}" + (f" ({count})" if len(counts) > 1 else "") for value, count in sorted(counts.items()))


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
