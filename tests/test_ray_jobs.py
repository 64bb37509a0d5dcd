"""`ray job submit` against a local head with token authentication: submitted, followed, succeeded, exit status passed on."""

import functools
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

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
    port, dashboard, agent, grpc = (free_port() for _ in range(4))  # another Ray may run beside it, whose address lies in /tmp/ray
    own = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: that of a socket may have 107 characters
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    options = ["--port", str(port), "--dashboard-port", str(dashboard), "--num-cpus", "4", "--temp-dir", str(own)]
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
    shutil.rmtree(own, ignore_errors=True)  # processes of the head may still write there for a moment


def with_token(environment: dict[str, str]) -> dict[str, str]:
    """As of somebody who has set the token and nothing else: `submit.py` knows what to do with it."""
    return {name: value for name, value in environment.items() if name != "RAY_AUTH_MODE"}


def start(head: tuple[str, dict[str, str]], log: Path, *options: str, runtime_env: Path | None = None) -> subprocess.Popen[str]:
    """Submits in the background; `log` gets all that it prints."""
    address, environment = head
    given = ["--runtime-env", str(runtime_env)] if runtime_env else []
    script = [sys.executable, str(ROOT / "ray_jobs" / "submit.py"), "--address", address, *given, "--", *options]
    # tests may themselves run where Ctrl-C is ignored (in the background of a script), and a child would inherit that
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        script, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True, env=with_token(environment), preexec_fn=heed_interrupts
    )


def submit(head: tuple[str, dict[str, str]], *options: str) -> subprocess.CompletedProcess[str]:
    address, environment = head
    script = [sys.executable, str(ROOT / "ray_jobs" / "submit.py"), "--address", address, "--", *options]
    return subprocess.run(script, capture_output=True, text=True, env=with_token(environment), timeout=900)


def refused(*arguments: str) -> str:
    """What is said of a submission that ends with status 2 before a cluster is asked for."""
    done = subprocess.run([sys.executable, str(ROOT / "ray_jobs" / "submit.py"), *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    return done.stderr


def test_a_submitted_job_is_followed_and_its_success_passed_on(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    done = submit(head, "--preset", "quickstart", "--run-dir", str(tmp_path / "run"), "--dry-run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ray job submit --address" in done.stdout
    assert "round-2: sample" in done.stdout  # the job's own output was followed
    assert head[1]["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_submitted_job_gives_the_same_bytes_as_debug(
    head: tuple[str, dict[str, str]], micro_run: Path, micro: Path, tmp_path: Path
) -> None:
    done = submit(head, "--preset", "quickstart", "--config", str(micro), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "history + tuned text" in done.stdout
    assert fingerprint(tmp_path / "run") == fingerprint(micro_run)


def test_a_failing_job_passes_its_status_on(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    done = submit(head, "--preset", "nothing", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "there is no preset 'nothing'" in done.stdout


def test_without_the_token_nothing_is_submitted(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = head
    done = submit((address, {**environment, "RAY_AUTH_TOKEN": "wrong" * 12}), "--preset", "quickstart", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "wrongwrong" not in done.stdout + done.stderr
    assert "submitted" not in done.stdout
    assert not (tmp_path / "run").exists()


TOO_MANY_GPUS = ("--preset", "quickstart", "--set", "cluster.workers=3", "--set", "cluster.gpus_per_worker=1")


def test_jobs_that_cannot_run_end_promptly(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """A wrong path, too many GPUs, and a package that is missing: here a job whose own working folder hides torch."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"working_dir": str(own)}))
    here = ("--run-dir", str(tmp_path / "run"))
    logs = [tmp_path / name for name in ("path", "gpus", "package")]
    jobs = [
        start(head, logs[0], "--preset", "ml-1m", "--data", str(tmp_path / "nowhere"), *here),
        start(head, logs[1], *TOO_MANY_GPUS, "--set", "cluster.wait_timeout_seconds=1", *here),
        start(head, logs[2], "--preset", "quickstart", *here, runtime_env=tmp_path / "own.yaml"),
    ]
    assert [job.wait(timeout=120) for job in jobs] == [2, 2, 2], "\n".join(log.read_text() for log in logs)
    path, gpus, package = (log.read_text() for log in logs)
    assert "nowhere is not there on this machine" in path  # a warning before, an error of the job after
    assert "error: cluster: data folder: on " in path
    assert "after 1 s the Ray cluster is too small: 3 GPU missing" in gpus
    assert "error: torch: the package is missing in " in package
    assert not (tmp_path / "run").exists()


def test_cancelled_jobs_end_promptly(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """Two jobs that wait for GPUs: Ctrl-C stops one, somebody else the other."""
    logs = [tmp_path / "interrupted", tmp_path / "stopped"]
    jobs = [start(head, log, *TOO_MANY_GPUS, "--run-dir", str(tmp_path / "run")) for log in logs]
    for log, job in zip(logs, jobs, strict=True):
        while "waiting for the cluster: 3 GPU missing; this ends in" not in log.read_text():
            assert job.poll() is None, log.read_text()
            time.sleep(0.2)
    jobs[0].send_signal(signal.SIGINT)
    found = re.search(r"submitted (\w+)", logs[1].read_text())
    assert found is not None
    subprocess.run(["ray", "job", "stop", "--no-wait", "--address", head[0], found[1]], env=head[1], check=True, capture_output=True)
    assert [job.wait(timeout=60) for job in jobs] == [130, 1]
    assert all(": stopped\n" in log.read_text() for log in logs)
    assert "The same command continues it" in logs[1].read_text()


def test_what_may_not_travel_is_refused(tmp_path: Path) -> None:
    run = ("--", "--preset", "quickstart", "--run-dir")
    assert "runs/x: a job runs in another folder" in refused("--", "--preset", "quickstart", "--run-dir=runs/x")
    assert "--run-dir (not given)" in refused("--", "--preset", "quickstart")
    secret = refused("--address", "http://me:hidden@127.0.0.1:8265", *run, "/r")
    assert "a URL holds a user or password" in secret
    assert "hidden" not in secret
    for text, message in (
        ("container: {image: x}", "container may not be set for a job"),
        ("env_vars: {HF_TOKEN: hidden}", "HF_TOKEN looks like a secret"),
        ("env_vars: {AWS_SECRET_ACCESS_KEY: hidden}", "AWS_SECRET_ACCESS_KEY looks like a secret"),
        ("pip: ['https://me:hidden@host/x.whl']", "a URL holds a user or password"),
        ("- a list", "holds no settings"),
    ):
        (tmp_path / "env.yaml").write_text(text)
        said = refused("--runtime-env", str(tmp_path / "env.yaml"), *run, "/r")
        assert message in said
        assert "hidden" not in said
