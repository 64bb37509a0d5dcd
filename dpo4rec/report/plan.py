"""The tables of `dpo4rec plan` on a terminal."""

from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

GIB = 2**30
TIMES = {"always": "always", "pass": "in a pass", "step": "in the optimizer's step", "cpu": "in CPU memory"}


def plan_tables(found: dict[str, Any]) -> Group:
    """The parts of a GPU's memory, the verdict, what to change, and the time."""
    title = f"{found['parameters']:,} parameters, {found['trained']:,} trained; each GPU, {found['tokens_per_pass']:,} tokens a pass"
    table = Table()
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("when")
    for part in found["parts"]:
        table.add_row(part["name"], _gib(part["bytes"]), TIMES[part["when"]])
    table.add_section()
    table.add_row("at most at a time", _gib(found["peak_bytes"]), "always + the larger of pass and step")
    verdict = "It fits" if found["fits"] else "It does not fit"
    lines = [Text(f"{verdict}: {_gib(found['peak_bytes'])} of {_gib(found['gpu_bytes'])} GiB.")]
    if found["cpu_bytes"]:
        lines.append(Text(f"CPU memory: {_gib(found['cpu_bytes'])} GiB for each GPU."))
    return Group(Text(title), table, *lines, *_changes(found), *_time(found["time"]))


def print_plan(found: dict[str, Any]) -> None:
    Console(width=max(Console().width, 120)).print(plan_tables(found))


def _changes(found: dict[str, Any]) -> list[Table | Text]:
    if found["fits"]:
        return []
    if not found["changes"]:
        return [Text("No change of the settings makes it smaller.")]
    table = Table("change", "GiB", "", title="What would help", title_justify="left")
    for one in found["changes"]:
        enough = "fits" if one["peak_bytes"] <= found["gpu_bytes"] else ""
        table.add_row(escape(" ".join(_settings(one["settings"]))), _gib(one["peak_bytes"]), enough)
    return [table]


def _settings(changes: dict[str, Any]) -> list[str]:
    texts = [f"alignment.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()]
    return [*texts, f"llm.quantization={changes['quantization']}"] if "quantization" in changes else texts


def _time(time: dict[str, float] | None) -> list[Text]:
    if time is None:
        return [Text("Time: give --tokens-per-second or --measured SUMMARY.JSON.")]
    reference, training = (_hours(time[name]) for name in ("reference_seconds", "training_seconds"))
    return [Text(f"Time: {time['steps']:,.0f} steps, {training} at the measured speed, and {reference} for the reference before them.")]


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}" if size >= 0.005 * GIB else "<0.01"
