"""python -m faults [--scale quick|short|full] [--jobs N] [--write] [ids...]: exit code 0 where all is well."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from transformers.utils import logging

from faults import table
from faults.harness import Scale, ids, run_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description="Throw faults at deft.")
    parser.add_argument("ids", nargs="*", metavar="id", help="faults such as d3, or groups such as d; all if none")
    parser.add_argument("--scale", type=Scale, choices=list(Scale), default=Scale.SHORT)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write faults.json and the README's table")
    parser.add_argument("--peers", action="store_true", help="throw them at transformers' Trainer in DEFT_PEERS_PYTHON")
    given = parser.parse_args()
    if given.peers:
        return _throw_at_peers()
    chosen = [fault for fault in ids() if not given.ids or {fault, fault[0]} & {each.lower() for each in given.ids}]
    if not chosen:
        parser.error(f"no such fault; there are {', '.join(ids())}")
    import deft.run.train  # noqa: F401  once, before anything is forked

    logging.disable_progress_bar()
    # Under nohup runs ignore SIGHUP, in the background of a script SIGINT, as is right; D3 is about runs at a terminal.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    outcomes = run_all(chosen, given.scale, given.jobs, lambda text: print(text, flush=True))
    if given.write:
        table.record(outcomes)
        table.write_table()
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


def _throw_at_peers() -> int:
    script = Path(__file__).parent / "peers" / "trainer.py"
    python = os.environ["DEFT_PEERS_PYTHON"]
    done = subprocess.run([python, str(script)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        table.record_peers(json.loads(done.stdout.splitlines()[-1]))
        table.write_table()
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
