"""The same faults thrown at transformers' Trainer, as its documentation has it started and resumed.

Runs in an environment of its own (DEFT_PEERS_PYTHON) and prints one JSON object: fault -> points, passed, how.
A point passes where nothing is lost or changed in silence: exact bits after a kill, an error or a warning otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

STEPS = 24


class Rows(Dataset):
    def __init__(self, order: list[int], edited: int | None = None) -> None:
        self.order, self.edited = order, edited

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.order[index]
        draw = torch.Generator().manual_seed(row + (1000 if row == self.edited else 0))
        ids = torch.randint(3, 120, (16,), generator=draw)
        return {"input_ids": ids, "labels": ids.clone()}


class Noting(TrainerCallback):
    """Notes each step that is done, with its loss."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        with self.path.open("a") as file:
            file.write(f"{state.global_step}\n")


def train(folder: Path, change: str = "", before: Callable[[Trainer], None] = lambda trainer: None) -> None:
    """One run in `folder`, resumed from its last checkpoint if it has one; its result in `result`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    rows = list(range(64))
    if change == "reordered":
        rows.reverse()
    if change == "removed":
        rows.pop(9)
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=4 if change == "batch" else 8,
        learning_rate=5e-3 if change == "learning rate" else 1e-3,
        seed=1 if change == "seed" else 0,
        save_steps=int(os.environ.get("SAVE_STEPS", "2")),
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=Rows(rows, 9 if change == "edited" else None))
    trainer.add_callback(Noting(folder / "steps"))
    before(trainer)
    last = get_last_checkpoint(folder / "out") if (folder / "out").is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    digest = hashlib.sha256(json.dumps(losses).encode())
    finite = True
    for tensor in trainer.model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
        finite = finite and bool(tensor.isfinite().all())
    (folder / "result").write_text(json.dumps({"digest": digest.hexdigest(), "finite": finite}))


def fork(folder: Path, **given: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        opened = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        train(folder, **given)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(folder: Path, **given: Any) -> tuple[int, dict[str, Any], str]:
    """Exit code, result and what was printed of a run to its end."""
    (folder / "result").unlink(missing_ok=True)
    (folder / "log").unlink(missing_ok=True)
    code = ended(fork(folder, **given))
    result = json.loads((folder / "result").read_text()) if (folder / "result").exists() else {}
    return code, result, (folder / "log").read_text()


def steps(folder: Path) -> int:
    path = folder / "steps"
    return len(path.read_text().split()) if path.exists() else 0


def wait_for_step(folder: Path, step: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while steps(folder) < step and time.monotonic() < deadline:
        time.sleep(0.002)


def a1(top: Path, count: int) -> dict[str, Any]:
    """kill -9 at random moments, then the same command; exact: the losses and weights of an undisturbed run."""
    (top / "whole").mkdir()
    began = time.monotonic()
    _, whole, _ = run(top / "whole")
    length, draw, exact, crashed = time.monotonic() - began, random.Random(0), 0, 0
    for index in range(count):
        folder = top / str(index)
        folder.mkdir()
        pid = fork(folder)
        time.sleep(length * (0.3 + 0.65 * (index + draw.random()) / count))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        code, result, _ = run(folder)
        exact += result.get("digest") == whole["digest"]
        crashed += code != 0
    return {"points": count, "passed": exact, "how": f"{crashed} resumes crash; saves every 2 of {STEPS} steps"}


def half_done(folder: Path) -> None:
    """A run that was killed after its checkpoint at step 12."""
    folder.mkdir()
    run(folder)
    for path in (folder / "out").iterdir():
        if int(path.name.rpartition("-")[2]) > 12:
            shutil.rmtree(path)


def damaged(top: Path, count: int, damage: Callable[[Path, random.Random], None]) -> dict[str, Any]:
    half_done(top / "half")
    _, whole, _ = run(copy(top / "half", top / "sound"))
    draw, noticed, same = random.Random(0), 0, 0
    for index in range(count):
        folder = copy(top / "half", top / str(index))
        damage(folder / "out" / "checkpoint-12", draw)
        code, result, _ = run(folder)
        noticed += code != 0
        same += result.get("digest") == whole["digest"]
        shutil.rmtree(folder)
    how = f"{noticed} noticed, {same} without effect, {count - noticed - same} go on with another result in silence"
    return {"points": count, "passed": noticed + same, "how": how}


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def flip(checkpoint: Path, draw: random.Random) -> None:
    path = checkpoint / draw.choice(("model.safetensors", "optimizer.pt"))
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def b2(checkpoint: Path, draw: random.Random) -> None:
    """A page of zeros, or a file cut short."""
    path = checkpoint / draw.choice(("model.safetensors", "optimizer.pt"))
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    if draw.random() < 0.5:
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    else:
        del data[start:]
    path.write_bytes(bytes(data))


def b3(top: Path) -> dict[str, Any]:
    parts = iter(("optimizer.pt", "scheduler.pt", "rng_state.pth"))
    return damaged(top, 3, lambda checkpoint, draw: (checkpoint / next(parts)).unlink())


def b4(top: Path) -> dict[str, Any]:
    """Inputs changed before the resume: told, by an error or a line that an unchanged resume does not print."""
    half_done(top / "half")
    _, _, usual = run(copy(top / "half", top / "sound"))
    known = {words(line) for line in usual.splitlines()}
    told = []
    changes = ("edited", "reordered", "removed", "seed", "learning rate", "batch")
    for change in changes:
        code, _, output = run(copy(top / "half", top / change), change=change)
        if code or any(words(line) not in known for line in output.splitlines() if "{" not in line):
            told.append(change)
    return {"points": len(changes), "passed": len(told), "how": f"told: {', '.join(told) or 'none'}"}


def words(line: str) -> str:
    return " ".join(word for word in line.split() if word.isalpha())


def d3(top: Path) -> dict[str, Any]:
    """Signals in the middle of training: passed where no step is done twice."""
    passed, points = 0, 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        for after in (5, 11):
            folder = top / f"{int(number)}-{after}"
            folder.mkdir()
            os.environ["SAVE_STEPS"] = "8"
            pid = fork(folder)
            wait_for_step(folder, after)
            os.kill(pid, number)
            ended(pid)
            run(folder)
            points += 1
            passed += [int(line) for line in (folder / "steps").read_text().split()] == list(range(1, STEPS + 1))
    os.environ["SAVE_STEPS"] = "2"
    return {"points": points, "passed": passed, "how": "passed: no step done twice"}


def d5(top: Path) -> dict[str, Any]:
    """A second start in the same folder while the first is running."""
    refused = 0
    for index in range(3):
        folder = top / str(index)
        folder.mkdir()
        first = fork(folder)
        wait_for_step(folder, 4)
        (folder / "log").unlink()
        code = ended(fork(folder))
        refused += code != 0 and "Traceback" not in (folder / "log").read_text()
        ended(first)
    return {"points": 3, "passed": refused, "how": "passed: the second start is refused"}


def e1(top: Path) -> dict[str, Any]:
    """A loss or gradient that is not finite, once: passed where it stops, or the weights are finite in the end."""

    def bad_loss(trainer: Trainer) -> None:
        plain, seen = trainer.compute_loss, []

        def compute(*given: Any, **more: Any) -> Any:
            seen.append(1)
            found = plain(*given, **more)
            loss = found[0] if isinstance(found, tuple) else found
            return loss * float("nan") if len(seen) == 7 else found

        trainer.compute_loss = compute

    def bad_gradient(trainer: Trainer) -> None:
        seen: list[int] = []
        weight = trainer.model.model.layers[0].mlp.up_proj.weight
        weight.register_hook(
            lambda gradient: gradient * float("nan") if seen.append(1) is None and len(seen) == 7 else gradient
        )

    passed = 0
    for index, fault in enumerate((bad_loss, bad_gradient)):
        folder = top / str(index)
        folder.mkdir()
        code, result, _ = run(folder, before=fault)
        passed += code != 0 or result["finite"]
    return {"points": 2, "passed": passed, "how": "passed: it stops, or the weights are finite in the end"}


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    scale = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    many = max(2, round(40 * scale))
    faults: dict[str, Callable[[Path], dict[str, Any]]] = {
        "a1": lambda top: a1(top, many),
        "b1": lambda top: damaged(top, many, flip),
        "b2": lambda top: damaged(top, many, b2),
        "b3": b3,
        "b4": b4,
        "d3": d3,
        "d5": d5,
        "e1": e1,
    }
    found = {}
    for fault, throw in faults.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as top:
            found[fault] = throw(Path(top))
        found[fault]["seconds"] = round(time.monotonic() - began, 1)
        print(fault, found[fault], file=sys.stderr, flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"faults": found, "versions": versions}))


if __name__ == "__main__":
    main()
