"""The tables of `dpo4rec compare` on a terminal."""

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

RIGHT = ("R1", "R2", "R1 - R2", "95 % interval", "p", "Holm", "Wilcoxon", "Holm", "users")
MIN_WIDTH = 120  # columns of text; narrower tables would cut numbers


def comparison_tables(rows: list[dict[str, Any]]) -> Group:
    """A table of each protocol and metric with the candidates' hash, and below it how many users were left out."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['metric']}, {row['protocol']}, candidates {row['candidates_hash']}", []).append(row)
    tables = [Group(_table(title, of), *_left_out(of)) for title, of in groups.items()]
    note = f"p: paired bootstrap; Wilcoxon: signed-rank test; Holm: the p-value left of it corrected over the {len(rows)} rows."
    return Group(*tables, Text(note))


def print_comparison(rows: list[dict[str, Any]]) -> None:
    Console(width=max(Console().width, MIN_WIDTH)).print(comparison_tables(rows))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("condition", title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in RIGHT:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in _cells(row)))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    condition = row["a"] if row["a"] == row["b"] else f"{row['a']} against {row['b']}"
    means = [f"{row['mean_a']:.4f}", f"{row['mean_b']:.4f}", f"{row['difference']:+.4f}", f"[{row['low']:+.4f}, {row['high']:+.4f}]"]
    p_values = [_p_value(row[name]) for name in ("p_value", "p_value_holm", "wilcoxon_p_value", "wilcoxon_p_value_holm")]
    return [condition, *means, *p_values, str(row["users"])]


def _p_value(value: float) -> str:
    return f"{value:.4f}" if value >= 0.00005 else "<0.0001"


def _left_out(rows: list[dict[str, Any]]) -> list[Text]:
    counts = dict.fromkeys((row["only_a"], row["only_b"]) for row in rows if row["only_a"] or row["only_b"])
    return [Text(f"Left out: {a} users with a value in R1 only, {b} in R2 only.") for a, b in counts]
