"""What starts a run elsewhere: the Kubernetes manifest and the image agree, and the shell scripts refuse what they cannot do."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo4rec import __version__
from dpo4rec.cli import app
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.connect import Resources, lacking

ROOT = Path(__file__).parents[1]
MANIFEST = yaml.safe_load((ROOT / "ray_jobs" / "rayjob.yaml").read_text())
CLUSTER = MANIFEST["spec"]["rayClusterSpec"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORDS = shlex.split(MANIFEST["spec"]["entrypoint"])


def pods() -> list[tuple[int, dict[str, Any]]]:
    """The pod specifications with their number."""
    groups = [(1, CLUSTER["headGroupSpec"]), *((group["replicas"], group) for group in CLUSTER["workerGroupSpecs"])]
    return [(number, group["template"]["spec"]) for number, group in groups]


def resolved() -> dict[str, Any]:
    done = CliRunner().invoke(app, [*WORDS[1:], "--dry-run"])
    assert done.exit_code == 0, done.output
    return yaml.safe_load(done.output.split("stages:")[0])


def test_the_manifest_asks_for_what_the_run_needs() -> None:
    assert (MANIFEST["apiVersion"], MANIFEST["kind"], WORDS[:2]) == ("ray.io/v1", "RayJob", ["dpo4rec", "run"])
    assert CLUSTER["authOptions"] == {"mode": "token"}
    cluster = resolved()["cluster"]
    have = {"cpu": 0, "nvidia.com/gpu": 0}
    for number, pod in pods():
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        have = {name: amount + number * int(container["resources"]["limits"][name]) for name, amount in have.items()}
    assert have["cpu"] >= cluster["workers"] + 1
    assert have["nvidia.com/gpu"] == cluster["workers"] * cluster["gpus_per_worker"]


def test_the_slurm_line_of_the_docs_has_room() -> None:
    page = (ROOT / "docs" / "ray.md").read_text()
    (line,) = re.findall(r"^sbatch .*$", page, re.MULTILINE)
    words = shlex.split(line)
    nodes, gpus = (int(word.split("=")[1]) for word in words[1:3])
    (cpus,) = map(int, re.findall(r"^#SBATCH --cpus-per-task=(\d+)$", (ROOT / "launchers" / "slurm.sh").read_text(), re.MULTILINE))
    done = CliRunner().invoke(app, ["run", *words[words.index("launchers/slurm.sh") + 1 :], "--dry-run", "--cluster", "ray"])
    settings = yaml.safe_load(done.output.split("stages:")[0])
    cluster = ClusterConfig.model_validate(settings["cluster"])
    have: list[Resources] = [{"CPU": float(cpus), "GPU": float(gpus), "memory": 2.0**38}] * nodes
    assert not lacking(cluster, have, settings["alignment"]["workers"])


def test_all_pods_see_the_runs_folders() -> None:
    paths = [WORDS[WORDS.index(option) + 1] for option in ("--data", "--run-dir")]
    for _, pod in pods():
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert all(any(path.startswith(f"{mount}/") for mount in mounts.values()) for path in paths)


def test_manifest_and_image_agree() -> None:
    built = re.search(r"docker build --tag (\S+)", DOCKERFILE)
    assert built is not None
    assert built[1] == f"dpo4rec:{__version__}"
    user = re.search(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert user is not None
    for _, pod in pods():
        assert pod["containers"][0]["image"] == built[1]
        assert pod["securityContext"]["runAsUser"] == int(user[1]) > 0
    assert f"ray=={CLUSTER['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    own = yaml.safe_load((ROOT / "ray_jobs" / "runtime_env.yaml").read_text())["env_vars"]
    assert yaml.safe_load(MANIFEST["spec"]["runtimeEnvYAML"]) == {"env_vars": own}


def test_the_image_copies_what_is_there() -> None:
    for sources in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    assert "--constraint constraints.txt" in DOCKERFILE
    assert 'ENTRYPOINT ["dpo4rec"]' in DOCKERFILE


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        [str(ROOT / "launchers" / name), *arguments], capture_output=True, text=True, env={**kept, "PATH": path, **environment}
    )


@pytest.mark.parametrize("path", sorted((ROOT / "launchers").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("lines", "message"),
    [("worker-0 slots=2\nworker-1\n", "not a line like"), ("# none\n\n", "names no machine"), ("localhost slots=0\n", "not a line like")],
)
def test_a_bad_hostfile_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "alignment.json").write_text("{}")
    (tmp_path / "hosts").write_text(lines)
    done = script("align.sh", str(tmp_path), "--hostfile", str(tmp_path / "hosts"))
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    both = script("align.sh", str(tmp_path), "--hostfile", str(tmp_path / "hosts"), "--num-processes", "2")
    assert "exclude each other" in both.stderr
    assert script("align.sh", str(tmp_path), "--hostfile", str(tmp_path / "none")).returncode == 2


def test_the_slurm_script_refuses_what_it_cannot_do() -> None:
    outside = script("slurm.sh", "--preset", "quickstart", "--run-dir", "/shared/run")
    assert (outside.returncode, "this is no Slurm job" in outside.stderr) == (2, True)
    relative = script("slurm.sh", "--preset", "quickstart", "--run-dir", "run", SLURM_JOB_ID="7")
    assert (relative.returncode, "absolute path" in relative.stderr) == (2, True)


SRUN = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo localhost; echo 127.0.0.1
"""


@pytest.mark.slow
def test_the_slurm_script_starts_ends_and_passes_the_status_on(tmp_path: Path) -> None:
    """srun and scontrol are stand-ins that run everything on this machine: two Ray nodes, and a run that they refuse."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    number = str(os.getpid())
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "two", "SLURM_CPUS_PER_TASK": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    words = ["--preset", "ml-1m", "--data", str(tmp_path / "nowhere"), "--run-dir", str(tmp_path / "run"), "--set", "cluster.workers=3"]
    done = script("slurm.sh", *words, **slurm, PATH=path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("data folder: on ") == 1
    assert number not in subprocess.run(["pgrep", "-f", f"ray-{number}"], capture_output=True, text=True).stdout
