"""`ray job submit` against a local head with token authentication: submitted, followed, succeeded, exit status passed on."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.interruptions import fingerprint

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of the job server and the environment of a client; the head ends with the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment.pop("RAY_ADDRESS", None)
    port, dashboard, agent, grpc = (free_port() for _ in range(4))  # another Ray may run beside it
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    options = ["--port", str(port), "--dashboard-port", str(dashboard), "--num-cpus", "4"]
    options += ["--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(grpc)]
    process = subprocess.Popen([ROOT / "launchers" / "ray_head.sh", *options], env=environment, stdout=log, stderr=log)
    for _ in range(60):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", dashboard)) == 0:
                break
        time.sleep(1)
    time.sleep(3)  # the job server answers a moment after the port is open
    yield f"http://127.0.0.1:{dashboard}", environment
    process.terminate()
    process.wait(timeout=60)


def submit(head: tuple[str, dict[str, str]], *options: str) -> subprocess.CompletedProcess[str]:
    address, environment = head
    script = [sys.executable, str(ROOT / "ray_jobs" / "submit.py"), "--address", address, "--", *options]
    return subprocess.run(script, capture_output=True, text=True, env=environment, timeout=900)


def test_a_submitted_job_gives_the_same_bytes_as_debug(
    head: tuple[str, dict[str, str]], micro_run: Path, micro: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = submit(head, "--preset", "quickstart", "--config", str(micro), "--run-dir", str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ray job submit --address" in done.stdout
    assert "history + tuned text" in done.stdout  # the job's own output was followed
    assert head[1]["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr
    assert fingerprint(folder) == fingerprint(micro_run)


def test_a_failing_job_passes_its_status_on(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    done = submit(head, "--preset", "nothing", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "there is no preset 'nothing'" in done.stdout


def test_without_the_token_nothing_is_submitted(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = head
    done = submit((address, {**environment, "RAY_AUTH_TOKEN": "wrong" * 12}), "--preset", "quickstart", "--run-dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "submitted" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_relative_paths_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "ray_jobs" / "submit.py"), "--", "--preset", "quickstart", "--run-dir=runs/x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "runs/x" in done.stderr
    assert "absolute" in done.stderr
