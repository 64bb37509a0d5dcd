"""A text and its vector for every user: taken from the run where it has drawn them, written anew only where a prompt is new."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec import files
from dpo4rec.cluster.pool import cut
from dpo4rec.cluster.units import Files
from dpo4rec.driver import Run, left_out
from dpo4rec.files import read_parquet
from dpo4rec.knowledge.config import Decoding
from dpo4rec.stages import Report
from dpo4rec.user_table import UserTable

PURPOSE = "export"
"""Part of the seeds of texts that are drawn here."""


def write_users(
    run: Run, table: UserTable, decoding: Decoding, drawn: list[Path], prompts: pa.Table, new_prompts: pa.Table | None
) -> Report:
    """Adds the rows that `table` lacks, and those of `new_prompts` whose prompt is another one than before.

    Args:
        decoding: how texts are drawn that the run has not.
        drawn: folders with `samples` and `vectors` of texts that the run drew in just this way from `prompts`; a user's first counts.
        prompts: of the run's users, columns user_id and prompt_ids; for those who have no row and no new prompt.
        new_prompts: of new users, or of old users who have done more.

    Returns:
        How many rows there are now, were kept as they were, were taken from the run, and written by the policy; and, where a run may go on
        without them (`sampling.skip_failed_rows`), users on whom it fails, who get none.
    """
    ours, given = _hashes(prompts), {} if new_prompts is None else _hashes(new_prompts)
    wanted = {user: hash_ for user, hash_ in ours.items() if user not in table.hashes and user not in given}
    wanted |= {user: hash_ for user, hash_ in given.items() if table.hashes.get(user) != hash_}
    kept = len(table.hashes.keys() - wanted.keys())
    as_ours = {user for user, hash_ in wanted.items() if ours.get(user) == hash_}
    reused = {user for folder in drawn for user in _users(folder)} & as_ours
    asked, failed = wanted.keys() - reused, set[str]()
    if wanted:
        sources = [(folder, reused) for folder in drawn]
        if asked:
            of_given = [] if new_prompts is None else [_of(new_prompts, asked & given.keys())]
            questions = pa.concat_tables([_of(prompts, asked - given.keys()), *of_given])
            work = _work_folder(table, {user: wanted[user] for user in questions["user_id"].to_pylist()})
            _draw(run, questions, decoding, work)
            failed = left_out([work / "vectors"])
            asked -= failed
            wanted = {user: hash_ for user, hash_ in wanted.items() if user not in failed}
            sources.append((work, asked))
        table.replace(wanted, (texts for folder, users in sources for texts in _texts(folder, users)))
    _remove_work(table)
    return {
        "rows": len(table.hashes),
        "kept": kept,
        "reused": len(reused),
        "written": len(asked),
        **({"failed_users": len(failed)} if failed else {}),
    }


def _draw(run: Run, questions: pa.Table, decoding: Decoding, folder: Path) -> None:
    """Texts and vectors into the folder; units that an interrupted export has finished are kept."""
    sampler = run.sampler(PURPOSE, run.policy(run.config.rounds), decoding, 1)
    run.stream("export/sample", [run.sampling_step(sampler, folder)], cut(questions, run.config.sampling.users_per_unit))
    run.stream("export/encode", [run.encoding_step(folder)], Files(folder / "samples"))


def _work_folder(table: UserTable, hashes: dict[str, str]) -> Path:
    """Where these users' texts are drawn to; what another set of them has left there is removed."""
    key = hashlib.sha256(json.dumps([table.origin, hashes]).encode()).hexdigest()[:16]
    folder = table.file.with_name(f".users-{key}")
    _remove_work(table, folder)
    return folder


def _remove_work(table: UserTable, but: Path | None = None) -> None:
    for folder in table.file.parent.glob(".users-*"):
        if folder != but:
            files.remove(folder)


def _hashes(prompts: pa.Table) -> dict[str, str]:
    """SHA-256 (16 hex digits) of each user's prompt ids."""
    column = prompts["prompt_ids"].combine_chunks()
    ids, offsets = np.asarray(column.values, "<i4"), np.asarray(column.offsets)
    spans = zip(prompts["user_id"].to_pylist(), offsets[:-1], offsets[1:], strict=True)
    return {user: hashlib.sha256(ids[start:end].tobytes()).hexdigest()[:16] for user, start, end in spans}


def _of(prompts: pa.Table, users: set[str]) -> pa.Table:
    return prompts.filter(pa.array([user in users for user in prompts["user_id"].to_pylist()], pa.bool_()))


def _users(folder: Path) -> list[str]:
    """Those who have text and vector there."""
    return sorted(set(read_parquet(folder / "samples", ["user_id"])["user_id"].to_pylist()) - left_out([folder / "vectors"]))


def _texts(folder: Path, users: set[str]) -> Iterator[pa.Table]:
    """The first text of each of the users that the folder has: user_id, text, vector; a table a unit."""
    failed = pa.array(sorted(left_out([folder / "vectors"])), pa.string())
    for path in (path for path in sorted((folder / "samples").glob("*.parquet")) if not files.is_empty(path)):
        samples = read_parquet(path, ["user_id", "sample", "text"])
        samples = samples.filter(pc.invert(pc.is_in(samples["user_id"], failed)))
        if not len(samples):
            continue
        vectors = read_parquet(folder / "vectors" / path.name, ["user_id", "sample", "vector"])
        if not samples.select(["user_id", "sample"]).equals(vectors.select(["user_id", "sample"])):
            raise files.corrupted(folder / "vectors" / path.name, ValueError("its rows are not those of the texts"))
        table = samples.append_column("vector", vectors["vector"])
        yield _of(table.filter(pc.equal(table["sample"], 0)).drop_columns(["sample"]), users)
