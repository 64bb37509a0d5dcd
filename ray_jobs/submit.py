"""Submits a dpo4rec run to a Ray cluster, follows its log, and passes its exit status on.

    python ray_jobs/submit.py --address http://127.0.0.1:8265 -- --preset ml-1m --data /data/ml-1m --run-dir /shared/runs/ml-1m

What follows `--` are options of `dpo4rec run`; `--cluster ray` is added. The plain `ray job submit` line that does the same is printed.
The token of the cluster is read from the environment (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH) and is never printed.

Exit status: that of the run (2: its settings or input are to blame), 1 when it was stopped or could not start, 130 after Ctrl-C.
"""

import argparse
import asyncio
import itertools
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from environment import DEFAULT, read_environment, refuse_secrets

AGENT_TIMEOUT_SECONDS = 120
STOP_TIMEOUT_SECONDS = 30
TOKEN_FILE = Path("~/.ray/auth_token").expanduser()
"""Where Ray's client looks for the token when no variable says where it is."""
PATH_OPTIONS = ("--run-dir", "--data", "--config")
"""Options of `dpo4rec run` that name a path: it must mean the same on every node."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Ray's client lets this variable win over what it is told
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"), help="of the job server")
    parser.add_argument("--runtime-env", type=Path, default=DEFAULT, metavar="FILE", help="YAML; its own working_dir is left as it is")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="-- options of `dpo4rec run`")
    given = parser.parse_args(arguments)
    options = [word for word in given.options if word != "--"]
    try:
        check_paths(options)
        refuse_secrets([given.address, *options], "the command line")
        environment = read_environment(given.runtime_env)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ["RAY_API_SERVER_ADDRESS"] = given.address
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} or TOKEN_FILE.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # else Ray's client leaves the token out
    entrypoint = ["python", "-m", "dpo4rec.cli", "run", "--cluster", "ray", *options]
    line = ["ray", "job", "submit", "--address", given.address, "--runtime-env-json", json.dumps(environment), "--", *entrypoint]
    print(shlex.join(line), flush=True)
    return run(given.address, shlex.join(entrypoint), environment)


def check_paths(options: list[str]) -> None:
    """Warns of paths that are not there: this machine need not see the nodes' disks.

    Raises:
        ValueError: a path is relative, or no run folder is given.
    """
    pairs = [(name, value) for name, value in itertools.pairwise(options) if name in PATH_OPTIONS]
    pairs += [(name, value) for name, equals, value in (option.partition("=") for option in options) if equals and name in PATH_OPTIONS]
    if "--run-dir" not in dict(pairs):
        pairs.append(("--run-dir", "(not given)"))
    for name, path in pairs:
        if not Path(path).is_absolute():
            raise ValueError(f"{name} {path}: a job runs in another folder. Give an absolute path that all nodes see")
        if name != "--run-dir" and not Path(path).exists():
            print(f"warning: {name} {path} is not there on this machine; the job ends at once if the nodes do not see it", file=sys.stderr)


def run(address: str, entrypoint: str, environment: dict[str, Any]) -> int:
    """Submits and follows; what goes wrong on the way to the cluster is one line and status 1."""
    from ray.exceptions import RayError

    try:
        return asyncio.run(follow(address, entrypoint, environment))
    except KeyboardInterrupt:  # before there was a job
        return 130
    except (OSError, RuntimeError, ValueError, RayError) as error:
        print(f"error: {address}: {str(error).strip()}", file=sys.stderr)
        return 1


async def follow(address: str, entrypoint: str, environment: dict[str, Any]) -> int:
    """Submits, prints the log as it comes; Ctrl-C stops the job. Returns the exit status."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    job = await submitted(client, entrypoint, environment)
    print(f"submitted {job}", flush=True)
    try:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
        return status_of(job, await ended(client, job))
    except (KeyboardInterrupt, asyncio.CancelledError):
        client.stop_job(job)
        print(f"stopping {job}", file=sys.stderr, flush=True)
        status_of(job, await ended(client, job, STOP_TIMEOUT_SECONDS))
        return 130


async def submitted(client: Any, entrypoint: str, environment: dict[str, Any]) -> str:
    """The number of the submitted job. A head that has just started has no agent for jobs yet, so this waits for one."""
    deadline = time.monotonic() + AGENT_TIMEOUT_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        print("waiting for the cluster's job agent", file=sys.stderr, flush=True)
        await asyncio.sleep(5)


async def ended(client: Any, job: str, timeout_seconds: float = float("inf")) -> Any:
    """What is known of the job once it has ended (the log can end a moment before), or after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not (info := client.get_job_info(job)).status.is_terminal() and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    return info


def status_of(job: str, info: Any) -> int:
    """Says how the job has ended. Returns its exit status, 128 + N after signal N, 1 where it has none."""
    print(f"{job}: {info.status.value.lower()}", flush=True)
    if info.status.value == "SUCCEEDED":
        return 0
    if info.status.value == "STOPPED":
        print("The job was stopped. The same command continues it: what is finished stays finished.", file=sys.stderr)
    elif info.driver_exit_code is None:  # it never ran, and so has no log
        print(f"error: {info.message}", file=sys.stderr)
    code = info.driver_exit_code or 1
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
