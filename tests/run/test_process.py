"""`deft.train` leaves the process that called it as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_llama

SCRIPT = """
import ctypes, gc, hashlib, json, logging, os, random, signal, sys, warnings
import numpy, torch, transformers
from transformers.utils import logging as their_logging

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

def is_mapped(size):
    "Whether memory of this size is the system's again once it is freed."
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype, libc.malloc.restype = Mallinfo, ctypes.c_void_p
    before = libc.mallinfo2().hblks
    piece = ctypes.c_void_p(libc.malloc(size))
    found = libc.mallinfo2().hblks > before
    libc.free(piece)
    return found

def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()

def settings():
    umask = os.umask(0)
    os.umask(umask)
    return {
        "environment": dict(os.environ),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic],
        "precision": torch.get_float32_matmul_precision(),
        "grad": [torch.is_grad_enabled(), torch.is_anomaly_enabled()],
        "signals": [str(signal.getsignal(each)) for each in sorted(signal.valid_signals())],
        "folder": [os.getcwd(), umask],
        "warnings": str(warnings.filters),
        "logging": [logging.root.level, len(logging.root.handlers), their_logging.get_verbosity()],
        "gc": [gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()],
        "hooks": [str(sys.excepthook), str(sys.displayhook)],
        "random": [digest(random.getstate()), digest(numpy.random.get_state(legacy=True)),
                   digest(torch.get_rng_state().tolist())],
        "memory": is_mapped(256 * 2**20),
    }

import deft
import deft.run.api
model, rows, out, how = sys.argv[1:5]
before = settings()
if how == "python":
    deft.train(model, rows, output=out, epochs=1, precision=sys.argv[5], dropout="config")
else:
    sys.argv = ["deft", "train", f"model={model}", f"data.train={rows}", f"output={out}", "epochs=1", "precision=fp32"]
    from deft.commands import cli
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code
after = settings()
print("RESULT", json.dumps([name for name in before if before[name] != after[name]]))
"""


def changed(tmp_path: Path, *how: str) -> list[str]:
    """The settings that differ after a run."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": f" {n}."}) + "\n" for n in range(8)))
    model = write_llama(tmp_path / "model")
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment: dict[str, Any] = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", SCRIPT, str(model), str(rows), str(tmp_path / "run"), *how]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    found: list[str] = json.loads(ended.stdout.rpartition("RESULT ")[2])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of GNU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_from_python_changes_no_setting_of_the_process(tmp_path: Path, precision: str) -> None:
    assert changed(tmp_path, "python", precision) == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of GNU")
def test_the_command_line_keeps_freed_memory_and_bounds_kernels(tmp_path: Path) -> None:
    assert {"environment", "memory"} <= set(changed(tmp_path, "command"))
