"""From typing `deft train` to the end of its first optimizer step, on a model of 40 M parameters.

    python benchmarks/cpu/start.py [--runs 5] [--threads 2] [--profile]

GSM8K's 7,473 rows with a real tokenizer where the corpus is there, generated rows elsewhere; steps of 8 rows. Cold:
deft has kept nothing of earlier runs (the system may have files in memory). Cached: the same command again. --profile
names the slowest imports. Goals: below 10 s and 5 s. Writes benchmarks/results/start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exchange
from common import machine, workloads
from common.shapes import SHAPES
from run import CORPUS, ROOT, SETTINGS, python_path
from run import start as timed

RESULTS = ROOT / "benchmarks" / "results" / "start.json"
EXAMPLES = 8
GOALS = {"cold": 10.0, "cached": 5.0}


def prepare(folder: Path) -> Path:
    """The model, with a real tokenizer if there is one; the file to train on."""
    shape = SHAPES["40m"]
    settings = {**SETTINGS, "steps": 1, "examples_per_step": EXAMPLES, "threads": 2}
    exchange.write(folder, shape, workloads.rows("generated", 1000, shape.vocabulary, None), settings)
    tokenizer, data = CORPUS / "tokenizers" / "mistral-v1", CORPUS / "data" / "gsm8k_train.jsonl"
    if not (tokenizer.is_dir() and data.is_file()):
        return folder / "train.jsonl"
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / "model" / file.name)
    return data


def first_step(folder: Path, data: Path, threads: int) -> float:
    """Seconds until metrics.jsonl has its first line."""
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "deft", "train", f"model={folder / 'model'}", f"data.train={data}"]
    command += [f"output={out / 'run'}", f"batch.examples={EXAMPLES}", "steps=1", "epochs=1", "max_length=1024"]
    return timed(command, out / "run" / "metrics.jsonl", out / "log", threads)


def imports() -> list[tuple[float, str]]:
    """The slowest modules that `deft train` imports, with all that they import, in seconds."""
    command = [sys.executable, "-X", "importtime", "-c", "import deft.run"]
    environment = os.environ | {"PYTHONPATH": python_path()}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)", said)
    return sorted(((int(micros) / 1e6, name) for micros, name in found), reverse=True)[:25]


def help_seconds() -> float:
    environment = os.environ | {"PYTHONPATH": python_path()}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "deft", "--help"], env=environment, capture_output=True, check=True)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    machine.pin(options.threads)
    if options.profile:
        print("\n".join(f"{seconds:7.2f} s  {name}" for seconds, name in imports()))
    found: dict[str, list[float]] = {"cold": [], "cached": [], "help": [help_seconds() for _ in range(options.runs)]}
    with tempfile.TemporaryDirectory(prefix="deft-start-") as temporary:
        folder = Path(temporary)
        data = prepare(folder)
        os.environ["DEFT_CACHE"] = str(folder / "cache")
        for _ in range(options.runs):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for name in ("cold", "cached"):
                found[name].append(first_step(folder, data, options.threads))
                print(f"{name:7} {found[name][-1]:5.2f} s", flush=True)
    middle = {name: median(seconds) for name, seconds in found.items()}
    print("medians: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in middle.items()))
    report = {"seconds": found, "medians": middle, "goals": GOALS, "data": data.name, "examples_per_step": EXAMPLES}
    report |= {"machine": machine.described(options.threads), "date": date.today().isoformat()}
    report["versions"] = machine.versions("deft-sft", "torch", "transformers")
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(middle[name] < limit for name, limit in GOALS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
