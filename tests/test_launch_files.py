"""examples/launch/: shells and Python compile, options are torchrun's, and the pods of a Job find each other."""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deft.commands import launch

FOLDER = Path(__file__).parents[1] / "examples" / "launch"
SHELLS = [FOLDER / "two_nodes.sh", FOLDER / "slurm.sbatch"]


def launched(script: Path, tmp_path: Path, **values: str) -> list[str]:
    """What a script gives to `deft launch`, with commands that only say what they are given."""
    for name, text in {
        "deft": 'shift; printf "%s\\n" "$@" > "$SAID"',
        "srun": 'shift; "$@"',
        "scontrol": "echo node-0; echo node-1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    said = tmp_path / "said"
    subprocess.run(
        ["bash", str(script), "run.yaml", "epochs=2"],
        env={**os.environ, **values, "PATH": path, "SAID": str(said)},
        check=True,
    )
    return said.read_text().split("\n")[:-1]


@pytest.mark.parametrize("script", SHELLS, ids=lambda path: path.name)
def test_shells_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_python_compiles(path: Path, tmp_path: Path) -> None:
    py_compile.compile(str(path), str(tmp_path / "compiled"), doraise=True)


def test_every_way_gives_options_that_torchrun_has(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    found = {
        "shell": launch.parsed(launched(SHELLS[0], tmp_path, HEAD="10.0.0.1", RANKS="8")),
        "slurm": launch.parsed(launched(SHELLS[1], tmp_path, **slurm)),
        "kubernetes": launch.parsed(pod()["containers"][0]["command"][2:]),
    }
    for name, given in found.items():
        assert (given.nnodes, given.nproc_per_node, given.max_restarts) == ("2", "8", 3), name
        assert given.rdzv_backend == "c10d", name
        assert given.training_script_args[0] == "train", name
    assert [given.rdzv_endpoint for given in found.values()] == ["10.0.0.1:29500", "node-0:29500", "deft-0.deft:29500"]


def job() -> Any:
    service, found = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    assert (service["kind"], found["kind"]) == ("Service", "Job")
    assert service["spec"]["selector"] == {"job-name": found["metadata"]["name"]}
    assert found["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    return found


def pod() -> Any:
    return job()["spec"]["template"]["spec"]


def test_the_pods_of_the_job_have_what_they_name() -> None:
    spec = job()["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2
    (container,) = pod()["containers"]
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod()["volumes"]}
    named = {each["onExitCodes"]["containerName"] for each in spec["podFailurePolicy"]["rules"]}
    assert named == {container["name"]}
