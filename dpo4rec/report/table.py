"""The result table of a run on a terminal."""

from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

SHOWN = ("ndcg@1", "ndcg@3", "ndcg@5", "ndcg@10", "map@5")


def result_tables(results: dict[str, Any]) -> Group:
    """Metrics by condition, comparisons with 95 % intervals, and how the texts look."""
    texts = Table("policy", "temperature", "well-formed", "distinct", "grounded claims", "tokens", title="Texts of the test users")
    for policy, of in results["texts"].items():
        temperature = results["temperatures"]["chosen"][policy]
        grounded = f"{of['grounded']:.3f}" if "grounded" in of else "-"
        texts.add_row(policy, f"{temperature:g}", f"{of['well_formed']:.3f}", f"{of['distinct']:.3f}", grounded, f"{of['mean_tokens']:.1f}")
    return Group(_metrics(results), _comparisons(results), texts, *_correlations(results))


def print_results(results: dict[str, Any]) -> None:
    Console(width=None).print(result_tables(results))


MEASURED = ("ndcg@10", "hr@10", "ndcg@5", "mrr@10", "coverage@10", "popularity_lift@10", "long_tail@10", "novelty@10", "diversity@10")


def print_measured(protocol: str, summary: dict[str, Any]) -> None:
    """Recommenders fitted for their own sake: metrics by condition, and each fit against the first control."""
    table = Table(title=f"{protocol}: {summary['users']} test users, candidates {summary['candidates_hash']}")
    table.add_column("condition")
    for name in MEASURED:
        table.add_column(_heading(name), justify="right")
    for label, values in summary["metrics"].items():
        table.add_row(escape(label), *(f"{values[name]:.4f}" for name in MEASURED))
    cold = {name: count for name, count in summary.items() if name.startswith("cold_test_") and count}
    lines = [Text(f"{count} {name.replace('_', ' ')}: see docs/recommenders.md") for name, count in cold.items()]
    rows = [row for row in summary["comparisons"] if row["metric"] == "ndcg@10"]
    Console(width=max(Console().width, 120)).print(Group(table, _comparisons({"comparisons": rows}, "ndcg@10"), *lines))


def _heading(metric: str) -> str:
    name, _, cutoff = metric.partition("@")
    return f"{name.upper() if name in ('ndcg', 'hr', 'map', 'mrr') else name.replace('_', ' ')}@{cutoff}"


def _metrics(results: dict[str, Any]) -> Table:
    title = f"Test users: {results['test_users']}, {results['seeds']} seeds, lists {results['lists_hash']}"
    table = Table(title=title)
    table.add_column("condition")
    for name in SHOWN:
        table.add_column(_heading(name), justify="right")
    for label, values in results["metrics"].items():
        table.add_row(escape(label), *(f"{values[name]:.4f}" for name in SHOWN))
    return table


def _comparisons(results: dict[str, Any], metric: str = "ndcg@5") -> Table:
    table = Table(f"difference in {_heading(metric)}", "mean", "95 % interval", "p", "p (Holm)", title="Paired bootstrap over users")
    for row in results["comparisons"]:
        if row["metric"] == metric:
            interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
            p_values = (f"{row[name]:.4f}" for name in ("p_value", "p_value_holm"))
            table.add_row(escape(f"{row['a']} - {row['b']}"), f"{row['difference']:+.4f}", escape(interval), *p_values)
    return table


def _correlations(results: dict[str, Any]) -> list[Text]:
    lines = []
    for number, of in enumerate(results["rewards"]):
        found = of.get("rank_correlation_with_truth", {})
        if "mean" in found:
            figure = f"Spearman {found['mean']:.3f} ± {found['standard_error']:.3f} over {found['users']} users"
            lines.append(Text(f"Round {number}: the rewards follow the simulated users' true preferences: {figure}"))
    return lines
