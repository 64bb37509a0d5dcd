"""The table of `dpo4rec doctor` on a terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_diagnosis(rows: Iterable[tuple[str, str, str, str]]) -> None:
    """One line for each (what, asked, found, missing); nothing missing is "ok"."""
    table = Table("what", "asked", "found", "verdict")
    for what, asked, found, missing in rows:
        verdict = f"[red]missing: {escape(missing)}[/red]" if missing else "[green]ok[/green]"
        table.add_row(escape(what), escape(asked), escape(found), verdict)
    Console(width=max(Console().width, 120)).print(table)
