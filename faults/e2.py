"""E2: the same run again, in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from faults import runs
from faults.harness import ROOT, Result, Scale, tally
from faults.scenes import arguments, scene

TITLE = "repeated runs in fresh processes with random hash seeds: the same bits"
FIGURE = 10


def run(scale: Scale) -> Result:
    with scene() as folder:
        reference, _ = runs.undisturbed(folder)
        repeats = range(scale.of(1, 4, 10))
        return tally(runs.differences(reference, _train(folder, f"run-{n}", str(n + 1))) for n in repeats)


def control() -> Result:
    """Another seed."""
    with scene() as folder:
        reference, _ = runs.undisturbed(folder)
        return tally([runs.finish(folder, "other", reference, seed=1)])


def _train(folder: Path, output: str, hash_seed: str) -> Path:
    given = arguments(folder, output=folder / output, **runs.SETTINGS)
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/src"}
    subprocess.run(
        [sys.executable, "-m", "deft", "train", *given], env=environment, check=True, capture_output=True, cwd=folder
    )
    return folder / output
