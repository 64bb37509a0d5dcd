"""Teach a language model, by the recommender's own feedback, to write the user text that makes it rank better."""

import contextlib
import json
import logging
import os
import platform
import sys
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
app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)

Preset = Annotated[str | None, typer.Option(help="shipped settings: quickstart, ml-1m, ml-100k, sasrec-ml-1m")]
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
        except typer.Exit:
            raise
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: the same command goes on where it stopped", err=True)
            raise typer.Exit(130) from None
        except ModuleNotFoundError as error:  # also of package metadata
            remedy = "Install what pyproject.toml lists on every machine of the cluster, or give the job a runtime environment that has it"
            typer.echo(f"error: {error.name}: the package is missing in {sys.executable} on {platform.node()}. {remedy}", err=True)
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
    start_from: Annotated[
        Path | None, typer.Option(help="an earlier run's folder: what it has made and these settings do not change is taken over")
    ] = None,
) -> None:
    """The whole job: rounds, evaluation, result table. Running it again continues or skips what is done."""
    folder = run_dir or Path("runs") / (preset or "run")
    resolved = _resolved(start_from or folder, preset, config, data, cluster, set_)
    if dry_run:
        _print_plan(resolved)
        return
    if resolved.cluster.kind == "ray":
        from dpo4rec.cluster.doctor import check
        from dpo4rec.preflight import asked

        check(asked(resolved, folder))
    if start_from:
        from dpo4rec.run_folder import fork

        fork(start_from, folder, without=("evaluation", "recommenders", "report.html"))  # what is measured is measured anew
    with _open(resolved, folder) as job:
        job.rounds()
        _evaluate_rounds(job)
    typer.echo(f"Run folder: {folder}")


@app.command()
@guarded
def doctor(
    run_dir: Annotated[Path | None, typer.Argument(metavar="[RUN_DIR]", help="the run folder [default: runs/PRESET]")] = None,
    preset: Preset = None,
    config: File = None,
    data: Data = None,
    cluster: Cluster = None,
    set_: Settings = None,
) -> None:
    """Compare what the settings ask for with what the machines have: resources, disk, versions and folders on every node."""
    from dpo4rec.cluster.doctor import diagnose
    from dpo4rec.preflight import asked
    from dpo4rec.report.doctor import print_diagnosis

    folder = run_dir or Path("runs") / (preset or "run")
    rows = diagnose(asked(_resolved(folder, preset, config, data, cluster, set_), folder))
    print_diagnosis(rows)
    if missing := [row.what for row in rows if row.missing]:
        raise InputError("doctor", f"not all is well: {', '.join(missing)}", "The table says what is missing")


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

        if preset or config or cluster or set_:
            raise InputError(
                "--download", "it makes no run, so settings have no meaning there", "Give --data alone; prepare the run after it"
            )
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


_stage("sample", "Draw and encode the texts of a round's policy that recommenders are fitted on.")
_stage("score", "Let the recommenders score every text of a round; with reward.fit_users draw and encode them, too.")
_stage("pair", "Make preference pairs of a round's best and worst texts.")
_stage("align", "Align the language model on a round's pairs.")


@app.command()
@guarded
def fit(
    run_dir: RunDir,
    round_: Annotated[int | None, typer.Option("--round", min=0, help="round whose reward models to fit [default: 0]")] = None,
    model: Annotated[str | None, typer.Option(help="sasrec, gru4rec, prm, dlcm, setrank or mir, fitted for its own sake")] = None,
    name: Annotated[str | None, typer.Option(help="of the fit's folder R/recommenders/NAME [default: the model]")] = None,
    lists: Annotated[str | None, typer.Option(help="frozen or retrieved: what a re-ranker learns from [default: frozen]")] = None,
    texts: Annotated[list[str] | None, typer.Option(help="file of user texts (user_id, text); may be repeated")] = None,
    preset: Preset = None,
    config: File = None,
    data: Data = None,
    cluster: Cluster = None,
    set_: Settings = None,
) -> None:
    """Fit the cross-fitted reward models of a round, or with --model a recommender for its own sake.

    With --model, `--set recommender.KEY=` (re-rankers) and `--set sequential.KEY=` (sasrec, gru4rec) hold for this fit alone.
    """
    from dpo4rec.config import recommender_of

    if model is None:
        alone = {"--name": name, "--lists": lists, "--texts": texts}
        if any(alone.values()):
            raise InputError(", ".join(key for key, value in alone.items() if value), "belongs to --model", "Add --model, or leave it out")
        with _open(_resolved(run_dir, preset, config, data, cluster, set_), run_dir) as job:
            report = job.fit(round_ or 0)
    else:
        if round_ is not None:
            raise InputError("--round", "a model fitted for its own sake belongs to no round", "Leave out --round or --model")
        own = [setting for setting in set_ or [] if setting.startswith(("recommender.", "sequential."))]
        resolved = _resolved(run_dir, preset, config, data, cluster, [setting for setting in set_ or [] if setting not in own])
        options = recommender_of(resolved, model, name or model, lists, texts or [], own)
        with _open(resolved, run_dir) as job:
            from dpo4rec.recommend import Recommenders

            report = Recommenders(job).fit(options)
    typer.echo(yaml.safe_dump(report, sort_keys=False))


@app.command()
@guarded
def evaluate(
    run_dir: RunDir,
    trec: Annotated[Path | None, typer.Option(help="folder that gets the rankings of the rounds' conditions as TREC files")] = None,
    cluster: Cluster = None,
    set_: Settings = None,
) -> None:
    """Evaluate what a run folder holds, with all controls, and print the tables: its rounds, and what `fit --model` has fitted."""
    from dpo4rec.measure import Measurement
    from dpo4rec.recommend import Recommenders
    from dpo4rec.report.table import print_measured

    with _open(_resolved(run_dir, None, None, None, cluster, set_), run_dir) as job:
        measurement = Measurement(Recommenders(job))
        protocols = measurement.protocols()
        if (run_dir / "round-0" / "samples").is_dir() or not (protocols or measurement.unfinished):
            job.sample(job.config.rounds)
            _evaluate_rounds(job, trec)
        elif trec:
            raise InputError("--trec", f"{run_dir} has no rounds", "What `fit --model` fitted has TREC files in evaluation/<protocol>")
        for protocol, fits in protocols.items():
            print_measured(protocol, measurement.measure(protocol, fits))
        if measurement.unfinished:
            where = ", ".join(str(fit.path) for fit in measurement.unfinished)
            cause = "not measured: the fit is not finished, or its data or texts have changed since"
            raise InputError(where, cause, "Run its `dpo4rec fit` again, or remove the folder")


@app.command()
@guarded
def atomic(
    run_dir: RunDir,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="gets FOLDER/NAME/NAME.inter, .item and .user")],
    name: Annotated[str, typer.Option(help="of the data set, as RecBole wants it")] = "dpo4rec",
) -> None:
    """Write a run folder's prepared data as RecBole's atomic files."""
    from dpo4rec.data.atomic import write_atomic

    typer.echo(write_atomic(run_dir / "data", out, name))


@app.command()
@guarded
def export(
    run_dir: RunDir,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="new, or of an earlier export of the run")],
    users: Annotated[Path | None, typer.Option(help="Parquet or CSV of interactions: of new users, or of users who have done more")] = None,
    cluster: Cluster = None,
    set_: Settings = None,
) -> None:
    """Write what production needs of a finished run: adapter, merged model, re-ranker, and every user's text and vector."""
    from dpo4rec.export import Export

    with _open(_resolved(run_dir, None, None, None, cluster, set_), run_dir) as job:
        manifest = Export(job, out).write(users)
    written = {name: {key: value for key, value in part.items() if key != "origin"} for name, part in manifest["parts"].items()}
    typer.echo(yaml.safe_dump(written, sort_keys=False))


@app.command()
@guarded
def compare(
    first: Annotated[Path, typer.Argument(metavar="R1", help="a run folder")],
    second: Annotated[Path, typer.Argument(metavar="R2", help="the run folder to compare it with, or R1 again")],
    metric: Annotated[list[str] | None, typer.Option(help="e.g. hr@10, may be repeated [default: ndcg@10, or else ndcg@5]")] = None,
    condition: Annotated[str | None, typer.Option(help="fit or control of R1 [default: fits of the same name, or the only ones]")] = None,
    against: Annotated[str | None, typer.Option(help="fit or control of R2 [default: the one of --condition's name]")] = None,
    protocol: Annotated[str | None, typer.Option(help="catalogue, retrieved, frozen or lists [default: all that both have]")] = None,
) -> None:
    """Compare two evaluated run folders user by user: paired bootstrap and Wilcoxon, with Holm's correction."""
    from dpo4rec.evaluation.comparison import compare as compared
    from dpo4rec.report.compare import print_comparison

    print_comparison(compared(first, second, metric or (), condition=condition, against=against, protocol=protocol))


@app.command()
@guarded
def reproduce(
    study: Annotated[str, typer.Argument(help="ml-1m-dpo4rec")],
    data: Data = None,
    run_dir: Annotated[Path | None, typer.Option(help="the study's folder [default: runs/STUDY, or runs/STUDY-quick]")] = None,
    quick: Annotated[bool, typer.Option(help="one seed on a tenth of the users: does everything, shows nothing")] = False,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="these seeds alone, for several machines; may be repeated")] = None,
    cluster: Cluster = None,
    set_: Settings = None,
) -> None:
    """Repeat a published experiment, from the raw files to its tables; running it again continues.

    Fails with status 1 if a figure leaves the range that is stored with the study.
    """
    from dpo4rec.report.progress import ProgressDisplay
    from dpo4rec.report.study import tables
    from dpo4rec.study import Study, load_study
    from dpo4rec.study_results import write_study_results

    settings = [f"data.folder={json.dumps(str(data))}"] if data else []  # a string, whatever YAML would make of it
    settings += [f"cluster.kind={cluster}"] if cluster else []
    folder, display = run_dir or Path("runs") / (f"{study}-quick" if quick else study), ProgressDisplay()
    work = Study(load_study(study), folder, settings + (set_ or []), quick, display)
    if unknown := set(seed or []) - set(work.seeds):
        raise InputError(f"--seed {min(unknown)}", f"the study has seeds {work.seeds}", "Give some of these")
    left = [k for k in work.unfinished() if not seed or k in seed]
    if left and (resolved := work.settings_of(work.first, left[0])).cluster.kind == "ray":
        from dpo4rec.cluster.doctor import check
        from dpo4rec.preflight import asked

        check(asked(resolved, work.path(work.first, left[0])))
    typer.echo(f"{len(left)} of {len(work.seeds)} seeds to do, about {work.minutes(left):.0f} minutes on one core", err=True)

    def started(what: str) -> None:
        if work.finished():
            write_study_results(work)  # a look at what is done, while days go by
        typer.echo(what, err=True)

    try:
        work.run(left, started)
    finally:
        display.close()
    if not work.finished():
        return
    results = write_study_results(work)
    typer.echo(tables(results))
    if work.config.expected and not work.comparable():
        typer.echo("the study's expected ranges were not checked: they are of all seeds of the study as shipped", err=True)
    for name, of in results["unexpected"].items():
        typer.echo(f"unexpected: {name} is {of['found']}, and was expected in {of['expected']}", err=True)
    if results["unexpected"]:
        raise typer.Exit(1)


@app.command()
@guarded
def plan(
    model: Annotated[str | None, typer.Option(help="folder or hub name; only its config.json is read [default: llm.name]")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="instead: hidden=4096,layers=32,heads=32,kv_heads=8,intermediate=14336,vocabulary=128256[,tied]"),
    ] = None,
    preset: Preset = None,
    config: File = None,
    set_: Settings = None,
    gpu_memory_gib: Annotated[float, typer.Option(min=1, help="of one GPU")] = 80.0,
    pairs: Annotated[int, typer.Option(min=1, help="preference pairs")] = 10_000,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="of a prompt [default: what max_tokens leaves]")] = None,
    answer_tokens: Annotated[int | None, typer.Option(min=1, help="of an answer [default: max_new_tokens]")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(min=0, help="measured, of all workers together")] = None,
    measured: Annotated[Path | None, typer.Option(help="a finished run's R/round-0/adapter/summary.json: read them from it")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Memory of each GPU and time of an alignment run, before anything runs; and what to change where it does not fit."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to the standard output, where the JSON goes
        from dpo4rec.alignment.memory import Pairs
        from dpo4rec.alignment.plan import measured_speed, model_of, plan
        from dpo4rec.config import resolve
        from dpo4rec.report.plan import print_plan

        source = [] if preset or config else ["data.source=simulation"]  # which data does not matter here
        resolved = resolve(preset, config, source + (set_ or []))
        answer = answer_tokens or resolved.sampling.decoding.max_new_tokens
        longest = resolved.alignment.max_tokens
        if answer >= longest:
            cause = f"{answer} tokens leave no room for a prompt in alignment.max_tokens={longest}"
            raise InputError("--answer-tokens", cause, "Give fewer, or --set alignment.max_tokens=...")
        size = Pairs(pairs, prompt_tokens or longest - answer, answer)
        speed = measured_speed(tokens_per_second, measured)
        found = plan(model_of(model, shape, resolved.llm), resolved.alignment, size, gpu_memory_gib, speed)
    if json_:
        typer.echo(json.dumps(found, indent=1))
    else:
        print_plan(found)


def _resolved(
    folder: Path, preset: str | None, file: Path | None, data: Path | None, cluster: str | None, settings: list[str] | None
) -> "Config":
    """The settings of the command line; without preset and file those that the run folder was made with."""
    from dpo4rec.config import resolve

    given = [f"data.folder={json.dumps(str(data))}"] if data else []  # a string, whatever YAML would make of it
    given += [f"cluster.kind={cluster}"] if cluster else []
    own = folder / "config.yaml"
    if preset is None and file is None:
        if not own.exists():
            raise InputError(
                str(folder), "is no run folder yet, so its settings are unknown", "Correct the path, or begin with --preset or --config"
            )
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


def _evaluate_rounds(job: "Run", trec: Path | None = None) -> None:
    from dpo4rec.experiment import Experiment
    from dpo4rec.report.page import write_report
    from dpo4rec.report.table import print_results

    experiment = Experiment(job)
    print_results(experiment.evaluate())
    typer.echo(f"Report: {write_report(experiment)}")
    if trec:
        experiment.write_rankings(trec)
        typer.echo(f"TREC files: {trec}")


def _print_plan(config: "Config") -> None:
    typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    stages = ["prepare"] + [f"round-{r}: sample, fit, score, pair, align" for r in range(config.rounds)]
    typer.echo("\n".join(["stages:", *(f"  {stage}" for stage in [*stages, f"round-{config.rounds}: sample", "evaluate"])]))


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would fight the workers'
    logging.basicConfig()
    for handler in logging.getLogger().handlers:  # of the screen: files of logs have more
        handler.setLevel(logging.WARNING)
    app()


if __name__ == "__main__":
    main()
