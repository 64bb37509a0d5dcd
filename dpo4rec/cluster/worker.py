"""A worker around a worker: reads units, writes each result to its own file at once, and finds the user that a fault belongs to."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from dpo4rec import files
from dpo4rec.cluster.role_log import RoleLog
from dpo4rec.cluster.units import Source, by_user, readable
from dpo4rec.errors import InputError
from dpo4rec.settings import Settings

ATTEMPTS = 2
"""Of a unit whose worker raises: the same input seldom gives another outcome. Deaths of a process are retried more often."""


@dataclass(frozen=True)
class Step:
    """One pool of a chain.

    Args:
        worker: class with `__init__(config)` and `__call__(table) -> table`. A text in its attribute `warning` reaches the user.
        config: what each worker is made with.
        out: folder of the results, `<unit>.parquet` each.
        workers: actors (Ray only).
        gpus: of each actor (Ray only).
        name: role, in log files and messages.
        take: picks from a unit's input what the worker is given; None: all of it. Where no row is left, the result is an empty file.
        skip_failed: users that the worker fails on are left out and listed: `dpo4rec.files.failed(out)`.
    """

    worker: Callable[[Any], Callable[[pa.Table], pa.Table]]
    config: Settings
    out: Path
    workers: int = 1
    gpus: float = 0
    name: str = "worker"
    take: Callable[[pa.Table], pa.Table] | None = None
    skip_failed: bool = False

    def file(self, unit: str) -> Path:
        return self.out / f"{unit}.parquet"


class UnitWorker:
    """Runs a step on units by number: table of one row with columns unit (int64), failure and warning (strings) in, the same out.

    A failure is the parts of an `InputError` as JSON, empty where there is none. It travels as data, so that an error is the same in
    this process and on Ray, and is passed on by the steps after it; so do warnings.

    Args:
        step: what to run.
        source: names the units, and reads them when this is the first step.
        before: folder of the step before; None: this is the first.
        threads: of torch.
        logs: folder of the log files; None: none are written.
    """

    def __init__(self, step: Step, source: Source, before: Path | None, threads: int, logs: Path | None) -> None:
        torch.set_num_threads(threads)
        self.step, self.source, self.before = step, source, before
        self.log = RoleLog(logs, step.name)
        self.failure = self.warning = ""
        try:
            self.worker = step.worker(step.config)
            self.warning = getattr(self.worker, "warning", "")
        except Exception as error:
            self.failure = self._said(error, step.name, "cannot be started")

    def __call__(self, unit: pa.Table) -> pa.Table:
        """After a failure nothing more is made: the run stops."""
        self.failure = unit["failure"][0].as_py() or self.failure or self._failure_of(unit["unit"][0].as_py())
        warning = "; ".join(filter(None, [unit["warning"][0].as_py(), self.warning]))
        return pa.table({"unit": unit["unit"], "failure": [self.failure], "warning": [warning]})

    def _failure_of(self, number: int) -> str:
        """Makes the unit's file unless it is there; returns what went wrong."""
        name = self.source.name(number)
        if readable(self.step.file(name)):
            return ""
        try:
            self._make(name, self._input(number, name))
            return ""
        except Exception as error:
            return self._said(error, f"{self.step.name}, {name}", "it cannot be made")

    def _input(self, number: int, name: str) -> pa.Table:
        table = self.source.read(number) if self.before is None else files.read_parquet(self.before / f"{name}.parquet")
        return self.step.take(table) if self.step.take is not None and len(table) else table

    def _make(self, name: str, table: pa.Table) -> None:
        begun = time.monotonic()
        users = table["user_id"] if "user_id" in table.column_names and len(table) else None
        self.log(f"unit {name} begun: {len(table)} rows{f', {users[0]} to {users[-1]}' if users is not None else ''}")
        result, failed = self._result(name, table) if len(table) else (pa.table({}), {})
        listed = self.step.out / f"{name}.failed.json"
        if failed:
            files.write_json(failed, listed)  # before the result: a unit with a result is never run again
        else:
            files.remove(listed)
        files.write_parquet(result, self.step.file(name))
        self.log(f"unit {name} done: {len(result)} rows in {time.monotonic() - begun:.2f} s{f', {len(failed)} failed' if failed else ''}")

    def _result(self, name: str, table: pa.Table) -> tuple[pa.Table, dict[str, str]]:
        """The worker's result, and the users it fails on with their errors."""
        for _ in range(ATTEMPTS):
            try:
                return self.worker(table), {}
            except InputError:
                raise
            except Exception as error:
                self.log(f"unit {name} failed as a whole\n{traceback.format_exc()}")
                whole = error
        good, failed = self._alone(table)
        if failed and self.step.skip_failed and (good or len(failed) == 1):
            return pa.concat_tables(good) if good else pa.table({}), failed
        if not failed and self.step.skip_failed:
            return pa.concat_tables(good), {}
        raise self._blamed(name, failed, whole)

    def _alone(self, table: pa.Table) -> tuple[list[pa.Table], dict[str, str]]:
        """User by user: the results, and the errors of those that fail; up to the first, unless failures are skipped."""
        good, failed = [], {}
        for user, rows in by_user(table):
            try:
                good.append(self.worker(rows))
            except InputError:
                raise
            except Exception as error:
                self.log(f"user_id {user} failed alone\n{traceback.format_exc()}")
                failed[user] = f"{type(error).__name__}: {error}"
                if not self.step.skip_failed:
                    break
        return good, failed

    def _blamed(self, name: str, failed: dict[str, str], whole: Exception) -> InputError:
        if not failed:
            cause = f"the worker fails on these users together, {ATTEMPTS} times, and on none alone: {type(whole).__name__}: {whole}"
            return InputError(f"{self.step.name}, {name}", cause, f"Try smaller units{self._tail()}")
        user, error = next(iter(failed.items()))
        if len(failed) > 1:  # a broken worker, and not bad users: leaving them out would empty the run
            cause = f"the worker fails on each user of the unit, as on {user}: {error}"
            return InputError(f"{self.step.name}, {name}", cause, f"Mend the worker{self._tail()}")
        cause = f"the worker fails on it, {ATTEMPTS} times with the others of {name} and once alone: {error}"
        remedy = f"Mend its input, or leave such users out: sampling.skip_failed_rows=true{self._tail()}"
        return InputError(f"{self.step.name}, user_id {user}", cause, remedy)

    def _tail(self) -> str:
        """The worker's own last lines, to end a message with."""
        return "\n".join([f".\nThe worker's last lines ({self.log.name}):", *(f"  {line}" for line in self.log.tail)])

    def _said(self, error: Exception, where: str, cause: str) -> str:
        """The parts of an `InputError` as JSON: the error's own, or those of any other error."""
        if not isinstance(error, InputError):
            self.log(traceback.format_exc())
            error = InputError(where, f"{cause}: {type(error).__name__}: {error}", f"Mend the cause and run again{self._tail()}")
        self.log(f"stopped: {error.where}: {error.cause}")
        return json.dumps([error.where, error.cause, error.remedy])
