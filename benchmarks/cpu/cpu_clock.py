"""Runs a script, or with -m a module, in which time.perf_counter() counts the seconds of this process on all cores.

python benchmarks/cpu/cpu_clock.py SCRIPT [ARGUMENT]...
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

time.perf_counter = time.process_time
if sys.argv[1] == "-m":
    sys.argv[:2] = []
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv[:1] = []
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
