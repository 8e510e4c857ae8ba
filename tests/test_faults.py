"""The fault suite in its quick form: every fault is survived, and every control without its protection fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUPS = sorted({path.name[0] for path in (ROOT / "faults").glob("[a-z][0-9].py")})


@pytest.mark.parametrize("group", GROUPS)
def test_faults_are_survived_and_controls_fail(group: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "faults", "--scale", "quick", "--jobs", "1", group],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
