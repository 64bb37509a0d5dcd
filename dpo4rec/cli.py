"""Teach a language model, by the recommender's own feedback, to write the user text that makes it rank better."""

import contextlib
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from dpo4rec.errors import InputError

if TYPE_CHECKING:
    from dpo4rec.config import Config
    from dpo4rec.driver import Run

# The packages behind a command take seconds to import, so each command imports its own.
app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Preset = Annotated[str | None, typer.Option(help="shipped settings: quickstart, ml-1m, ml-100k")]
File = Annotated[Path | None, typer.Option("--config", help="YAML file with settings, over the preset")]
Data = Annotated[Path | None, typer.Option(help="folder of the source's files; short for --set data.folder=FOLDER")]
Cluster = Annotated[str | None, typer.Option(help="debug or ray; short for --set cluster.kind=KIND")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value, over preset and file; may be repeated")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="the run folder")]
Round = Annotated[int, typer.Option("--round", min=0, help="number of the round, from 0")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Prints an `InputError` as one line and exits with status 2; any other error keeps its traceback and exits with status 1."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except Exception:  # the last line of defence of a command
            traceback.print_exc()
            raise typer.Exit(1) from None

    return run


@app.command()
@guarded
def run(
    preset: Preset = None,
    config: File = None,
    data: Data = None,
    run_dir: Annotated[Path | None, typer.Option(help="the run folder [default: runs/PRESET]")] = None,
    cluster: Cluster = None,
    set_: Settings = None,
    dry_run: Annotated[bool, typer.Option(help="print the resolved settings and the stages, and stop")] = False,
) -> None:
    """The whole job: rounds, evaluation, result table. Running it again continues or skips what is done."""
    folder = run_dir or Path("runs") / (preset or "run")
    resolved = _resolved(folder, preset, config, data, cluster, set_)
    if dry_run:
        _print_plan(resolved)
        return
    from dpo4rec.experiment import Experiment
    from dpo4rec.report.table import print_results

    with _open(resolved, folder) as job:
        job.rounds()
        results = Experiment(job).evaluate()
    print_results(results)
    typer.echo(f"Run folder: {folder}")


@app.command()
@guarded
def prepare(
    target: Annotated[str, typer.Argument(metavar="RUN_DIR | ml-1m | ml-100k", help="run folder, or with --download the data set")],
    download: Annotated[bool, typer.Option(help="fetch the official archive into --data")] = False,
    preset: Preset = None,
    config: File = None,
    data: Data = None,
    cluster: Cluster = None,
    set_: Settings = None,
) -> None:
    """Data, lists, built-in model and prompts of a run; or, with --download, an official data set."""
    if download:
        from dpo4rec.data.download import download as fetch

        fetch(target, data or Path("data") / target)
        return
    with _open(_resolved(Path(target), preset, config, data, cluster, set_), Path(target)) as job:
        job.prepare()


def _stage(name: str, doc: str) -> None:
    """Adds a command that runs one stage of one round with the run folder's settings."""

    def command(run_dir: RunDir, round_: Round = 0, cluster: Cluster = None, set_: Settings = None) -> None:
        with _open(_resolved(run_dir, None, None, None, cluster, set_), run_dir) as job:
            report = getattr(job, name)(round_)
        typer.echo(yaml.safe_dump(report, sort_keys=False) if report else f"{name} is done")

    command.__doc__ = doc
    app.command(name)(guarded(command))


_stage("sample", "Draw the texts of a round's policy for training and validation users, and encode them.")
_stage("fit", "Fit the cross-fitted recommenders of a round on its texts.")
_stage("score", "Let the recommenders score every text of a round.")
_stage("pair", "Make preference pairs of a round's best and worst texts.")
_stage("align", "Align the language model on a round's pairs.")


@app.command()
@guarded
def evaluate(run_dir: RunDir, cluster: Cluster = None, set_: Settings = None) -> None:
    """Evaluate a run whose rounds are done, with all controls, and print the table."""
    from dpo4rec.experiment import Experiment
    from dpo4rec.report.table import print_results

    with _open(_resolved(run_dir, None, None, None, cluster, set_), run_dir) as job:
        job.sample(job.config.rounds)
        results = Experiment(job).evaluate()
    print_results(results)


def _resolved(
    folder: Path, preset: str | None, file: Path | None, data: Path | None, cluster: str | None, settings: list[str] | None
) -> "Config":
    """The settings of the command line; without preset and file those that the run folder was made with."""
    from dpo4rec.config import resolve

    given = [f"data.folder={data}"] if data else []
    given += [f"cluster.kind={cluster}"] if cluster else []
    own = folder / "config.yaml"
    if preset is None and file is None:
        if not own.exists():
            raise InputError(str(folder), "is no run folder yet, so its settings are unknown", "Give --preset or --config")
        file = own
    return resolve(preset, file, given + (settings or []))


@contextlib.contextmanager
def _open(config: "Config", folder: Path) -> "Iterator[Run]":
    from dpo4rec.driver import Run
    from dpo4rec.report.progress import ProgressDisplay

    display = ProgressDisplay()
    try:
        job = Run(config, folder, display)
        yield job
        job.folder.release()
    finally:
        display.close()


def _print_plan(config: "Config") -> None:
    typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    stages = ["prepare"] + [f"round-{r}: sample, fit, score, pair, align" for r in range(config.rounds)]
    typer.echo("\n".join(["stages:", *(f"  {stage}" for stage in [*stages, f"round-{config.rounds}: sample", "evaluate"])]))


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would fight the workers'
    logging.basicConfig(level=logging.WARNING)
    app()


if __name__ == "__main__":
    main()
