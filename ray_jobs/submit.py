"""Submits a dpo4rec run to a Ray cluster, follows its log, and passes its exit status on.

    python ray_jobs/submit.py --address http://127.0.0.1:8265 -- --preset ml-1m --data /data/ml-1m --run-dir /shared/runs/ml-1m

What follows `--` are options of `dpo4rec run`; `--cluster ray` is added. The plain `ray job submit` line that does the same is printed.
The token of the cluster is read from the environment (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH) and is never printed.
"""

import argparse
import asyncio
import itertools
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RUNTIME_ENVIRONMENT = Path(__file__).with_name("runtime_env.yaml")
AGENT_TIMEOUT_SECONDS = 120
PATH_OPTIONS = ("--run-dir", "--data", "--config")
"""Options of `dpo4rec run` that name a path: it must mean the same on every node."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default=os.environ.get("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:8265"))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="-- options of `dpo4rec run`")
    given = parser.parse_args(arguments)
    options = [word for word in given.options if word != "--"]
    for name, path in relative_paths(options):
        print(f"error: {name} {path}: a job runs in another folder. Give an absolute path that all nodes see", file=sys.stderr)
        return 2
    entrypoint = shlex.join(["python", "-m", "dpo4rec.cli", "run", "--cluster", "ray", *options])
    print(f"ray job submit --address {given.address} --working-dir {ROOT} --runtime-env {RUNTIME_ENVIRONMENT} -- {entrypoint}", flush=True)
    return asyncio.run(follow(given.address, entrypoint))


def relative_paths(options: list[str]) -> list[tuple[str, str]]:
    """The path options whose value is relative; a run folder must be given."""
    pairs = [(name, value) for name, value in itertools.pairwise(options) if name in PATH_OPTIONS]
    pairs += [tuple(option.split("=", 1)) for option in options if option.startswith(tuple(f"{name}=" for name in PATH_OPTIONS))]  # type: ignore[misc]
    if "--run-dir" not in [name for name, _ in pairs]:
        pairs.append(("--run-dir", "(not given)"))
    return [(name, value) for name, value in pairs if not Path(value).is_absolute()]


def runtime_environment() -> dict[str, Any]:
    """The allow-listed runtime environment, with the checkout as working folder: data, runs and virtual environments stay behind."""
    return {**yaml.safe_load(RUNTIME_ENVIRONMENT.read_text(encoding="utf-8")), "working_dir": str(ROOT)}


async def submitted(client: Any, entrypoint: str) -> str:
    """The number of the submitted job. A head that has just started has no agent for jobs yet, so this waits for one."""
    deadline = time.monotonic() + AGENT_TIMEOUT_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_environment())
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        print("waiting for the cluster's job agent", file=sys.stderr, flush=True)
        await asyncio.sleep(5)


async def follow(address: str, entrypoint: str) -> int:
    """Submits, prints the log as it comes; Ctrl-C stops the job. Returns 0 when it succeeded, else the job's own status or 1."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(address)
    job = await submitted(client, entrypoint)
    print(f"submitted {job}", flush=True)
    try:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
    except (KeyboardInterrupt, asyncio.CancelledError):
        client.stop_job(job)
        print(f"stopped {job}", file=sys.stderr)
        return 130
    status = client.get_job_status(job)
    while not status.is_terminal():  # the log can end a moment before the status is known
        await asyncio.sleep(0.5)
        status = client.get_job_status(job)
    info = client.get_job_info(job)
    print(f"{job}: {status.value.lower()}", flush=True)
    return 0 if status == JobStatus.SUCCEEDED else info.driver_exit_code or 1


if __name__ == "__main__":
    sys.exit(main())
