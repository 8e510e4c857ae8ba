"""manifest.json: what is needed to say where a run came from."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deft.core import versions
from deft.core.redact import redacted


def collect(*, seed: int, device: str, dtype: str, data: Mapping[str, str], tokenizer_json: str) -> dict[str, Any]:
    """Versions, git state, seed, device, and the digests of data files, by name, and of the tokenizer."""
    return {
        "versions": versions.installed(),
        "git": _git_state(),
        "command": [redacted(argument) for argument in (Path(sys.argv[0]).name, *sys.argv[1:])],
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "data_sha256": dict(data),
        "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode("utf-8")).hexdigest(),
    }


def _git_state() -> dict[str, Any] | None:
    """The commit of the folder the run was started in, and whether it had changes; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=5)
    return done.stdout.strip()
