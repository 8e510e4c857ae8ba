"""deft and TRL on the same tokens in the same order: is it the same training? Prints a table, writes the figures.

    DEFT_PEERS_PYTHON=.../python python benchmarks/parity_trl/run.py [--steps 200] [--accumulation 4]
    DEFT_PEERS_PYTHON=.../python python benchmarks/parity_trl/run.py --reuse FOLDER

Runs in deft's environment. deft trains first and leaves, in a folder, the rows in the order in which it consumed them;
`trl_side.py`, started in the environment that has TRL, trains on those; then the two curves are compared. What stands
in the folder, `settings.json` and `rows.jsonl` (see `trl_side.py`), `deft.jsonl` (deft's metrics.jsonl) and
`trl.jsonl`, is all there is to the exchange: with --reuse, everything but TRL's part is taken from there.

Passes if the losses differ by at most 1e-5 before anything was learnt and 1e-3 anywhere, at the same learning rates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(os.environ.get("DEFT_CORPUS", ROOT.parent / "shared" / "corpus"))
RESULTS = ROOT / "benchmarks" / "results" / "parity_trl.json"

LIMITS = {"loss_step_0": 1e-5, "loss": 1e-3, "learning_rate_relative": 1e-9}
"""Largest difference allowed. The last is no claim about deft: at other rates the curves cannot be compared."""

Settings = dict[str, Any]
Record = dict[str, float]


# --- deft's half -----------------------------------------------------------------------------------------------------


def demonstrations(settings: Settings, source: Path) -> Iterator[dict[str, str]]:
    """Questions and answers as prompt and completion, those that fit the model's context whole."""
    from transformers import AutoConfig

    import deft

    found = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    pairs = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in found]
    context = AutoConfig.from_pretrained(settings["model"]).max_position_embeddings
    for example in deft.encode(pairs, settings["model"], max_length=context, overflow="drop"):
        yield pairs[example.origin.line - 1]


def write_jsonl(path: Path, rows: Iterator[Any] | list[Any]) -> int:
    """One JSON object per line; how many there were."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def planned_rows(folder: Path) -> Iterator[dict[str, list[int]]]:
    """{"input_ids", "labels"} of every example of deft's run in `folder`/deft, step by step in the plan's order."""
    from rich.console import Console

    from deft.run import config
    from deft.run.prepare import prepare
    from deft.run.reading import Session

    saved = config.load(str(folder / "deft" / "config.yaml"))
    session = Session(console=Console(quiet=True))
    planned = prepare(saved.model_copy(update={"output": None}), session).fit.planned
    for step in range(planned.steps):
        for example in planned.members(step):
            (part,) = example
            yield {"input_ids": part.tokens.tolist(), "labels": part.labels.tolist()}


def deft_losses(settings: Settings, folder: Path, source: Path) -> None:
    """Train with deft; leaves train.jsonl, rows.jsonl, deft.jsonl in the folder, and the run in deft/."""
    import deft

    wanted = settings["steps"] * settings["examples_per_step"]
    if (found := write_jsonl(folder / "train.jsonl", islice(demonstrations(settings, source), wanted))) < wanted:
        raise SystemExit(f"{source.name}: {found} rows fit the model's context, {wanted} are needed")
    deft.train(
        model=settings["model"],
        data=str(folder / "train.jsonl"),
        output=str(folder / "deft"),
        epochs=1,
        batch__examples=settings["examples_per_step"],
        optimizer__lr=settings["lr"],
        optimizer__betas=settings["betas"],
        optimizer__eps=settings["eps"],
        optimizer__weight_decay=settings["weight_decay"],
        optimizer__clip=settings["max_grad_norm"],
        schedule__name=settings["schedule"],
        schedule__warmup=settings["warmup_steps"],
        precision="fp32",
        device="cpu",
        seed=settings["seed"],
    )
    write_jsonl(folder / "rows.jsonl", planned_rows(folder))
    shutil.copyfile(folder / "deft" / "metrics.jsonl", folder / "deft.jsonl")


# --- TRL's half ------------------------------------------------------------------------------------------------------


def trl_losses(folder: Path, peers_python: str, accumulation: int) -> dict[str, Any]:
    """Start trl_side.py in its own environment; what it says about its run. Its output goes to trl.log."""
    side = Path(__file__).with_name("trl_side.py")
    command = [peers_python, str(side), str(folder), "--accumulation", str(accumulation)]
    for stale in ("trl.jsonl", "trl_run.json"):
        (folder / stale).unlink(missing_ok=True)
    with (folder / "trl.log").open("w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        tail = (folder / "trl.log").read_text(encoding="utf-8").splitlines()[-15:]
        raise SystemExit("\n".join([f"trl_side.py ended with {code}:", *tail]))
    return json.loads((folder / "trl_run.json").read_text(encoding="utf-8"))


# --- the comparison --------------------------------------------------------------------------------------------------


def read_records(path: Path, steps: int) -> list[Record]:
    """The lines of a metrics file; SystemExit unless there is one per step."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if len(records) != steps:
        raise SystemExit(f"{path.name} has {len(records)} steps, the settings ask for {steps}")
    return records


def largest(ours: list[Record], theirs: list[Record], name: str, relative: bool = False) -> float:
    """Largest difference of a figure over the steps; NaN if any difference is NaN."""
    gaps = [
        abs(a[name] - b[name]) / (max(abs(b[name]), sys.float_info.min) if relative else 1.0)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)


def differences(ours: list[Record], theirs: list[Record]) -> dict[str, float]:
    """The figures that the limits are for, and two that only inform. Steps are compared by their place in the file."""
    return {
        "loss_step_0": largest(ours[:1], theirs[:1], "loss"),
        "loss": largest(ours, theirs, "loss"),
        "learning_rate_relative": largest(ours, theirs, "learning_rate", relative=True),
        "grad_norm_step_0_relative": largest(ours[:1], theirs[:1], "grad_norm", relative=True),
        "grad_norm_relative": largest(ours, theirs, "grad_norm", relative=True),
    }


def table(ours: list[Record], theirs: list[Record], rows: int = 11) -> str:
    """About `rows` steps, evenly spread, first and last among them."""
    last = len(ours) - 1
    shown = sorted({round(last * i / (rows - 1)) for i in range(rows)})
    lines = [f"{'step':>5} {'loss deft':>12} {'loss TRL':>12} {'difference':>11} {'norm deft':>11} {'norm TRL':>11}"]
    for step in shown:
        a, b = ours[step], theirs[step]
        lines.append(
            f"{step:>5} {a['loss']:>12.7f} {b['loss']:>12.7f} {abs(a['loss'] - b['loss']):>11.2e}"
            f" {a['grad_norm']:>11.6f} {b['grad_norm']:>11.6f}"
        )
    return "\n".join(lines)


def verdict(found: dict[str, float]) -> str:
    """One line per figure: the largest difference, its limit, whether it holds."""
    lines = []
    for name, value in found.items():
        limit = LIMITS.get(name)
        judged = "" if limit is None else f"  limit {limit:.0e}  {'ok' if value <= limit else 'FAILED'}"
        lines.append(f"largest difference of {name:<26} {value:.3e}{judged}")
    return "\n".join(lines)


def passes(found: dict[str, float]) -> bool:
    """Whether every limit holds. NaN holds none."""
    return all(found[name] <= limit for name, limit in LIMITS.items())


# --- the report ------------------------------------------------------------------------------------------------------


def machine(settings: Settings) -> dict[str, Any]:
    """What it ran on, without names or paths."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": settings.get("threads"),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def our_versions() -> dict[str, str]:
    """Versions in deft's environment; "not installed" for one that is used from a checkout."""
    found = {}
    for name in ("deft-sft", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def report(settings: Settings, trl_run: dict[str, Any], found: dict[str, float]) -> dict[str, Any]:
    """What goes to the results file."""
    return {
        "compared": "deft and TRL's SFTTrainer: same tokens, labels, order and settings, fp32 on the CPU",
        "versions": {"deft": our_versions(), "trl": trl_run["versions"]},
        "machine": machine(settings),
        "settings": settings | {"model": Path(settings["model"]).name, "accumulation_trl": trl_run["accumulation"]},
        "largest_difference": {name: value if math.isfinite(value) else str(value) for name, value in found.items()},
        "limits": LIMITS,
        "seconds_trl": trl_run["seconds"],
        "passed": passes(found),
    }


# --- the command -----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(CORPUS / "models" / "stories260K"))
    parser.add_argument("--data", type=Path, default=CORPUS / "data" / "gsm8k_train.jsonl", help="question and answer")
    parser.add_argument("--folder", type=Path, help="where the exchange stands afterwards; default: nowhere")
    parser.add_argument("--reuse", type=Path, help="a folder with settings.json, rows.jsonl and deft.jsonl")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peers-python", default=os.environ.get("DEFT_PEERS_PYTHON"), help="$DEFT_PEERS_PYTHON")
    parser.add_argument("--accumulation", type=int, default=1, help="TRL's micro-batches per step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--examples", type=int, default=8, help="examples per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0, help="TRL spares norms and biases")
    parser.add_argument("--schedule", choices=("constant", "linear", "cosine"), default="cosine")
    parser.add_argument("--warmup", type=int, default=0, help="steps; deft's warm-up is not transformers': 0 compares")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not options.peers_python:
        parser.error("name the python that has TRL in $DEFT_PEERS_PYTHON or with --peers-python")
    return options


def settings_from(options: argparse.Namespace) -> Settings:
    """The settings.json of a new exchange."""
    return {
        "model": options.model,
        "examples_per_step": options.examples,
        "steps": options.steps,
        "lr": options.lr,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": options.weight_decay,
        "max_grad_norm": 1.0,
        "schedule": options.schedule,
        "warmup_steps": options.warmup,
        "dtype": "fp32",
        "seed": 0,
        "threads": options.threads,
    }


def exchange(options: argparse.Namespace, folder: Path) -> bool:
    """Everything, in a folder that exists."""
    if not options.reuse:
        folder.mkdir(parents=True, exist_ok=True)
        settings = settings_from(options)
        (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        deft_losses(settings, folder, options.data)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    trl_run = trl_losses(folder, options.peers_python, options.accumulation)
    ours, theirs = (read_records(folder / name, settings["steps"]) for name in ("deft.jsonl", "trl.jsonl"))
    found = differences(ours, theirs)
    print(table(ours, theirs), verdict(found), sep="\n\n")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(report(settings, trl_run, found), indent=2) + "\n", encoding="utf-8")
    return passes(found)


def main() -> int:
    """0 if deft and TRL agree."""
    options = arguments()
    if folder := options.reuse or options.folder:
        return 0 if exchange(options, folder) else 1
    with tempfile.TemporaryDirectory() as temporary:
        return 0 if exchange(options, Path(temporary)) else 1


if __name__ == "__main__":
    sys.exit(main())
