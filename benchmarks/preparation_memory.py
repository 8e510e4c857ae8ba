"""What preparing a million rows takes: memory beside ten thousand rows, time, a second start, the plan; a bad row.

    python benchmarks/preparation_memory.py

Every figure is of a fresh process. Rows are short chats (two messages, about 190 bytes), encoded with the tokenizer
and the chat template of `qwen2.5` of the corpus (DEFT_CORPUS). Memory is the largest sum of resident memory of the
process and its helpers, looked at every 50 ms; the process has torch in it, as a run has. Times are of reading and
encoding; libraries and the tokenizer are loaded before and told apart. A second start hashes the file again, checks
every byte of the cache, settles fates and the ledger. Pages of the files that are mapped count as memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "preparation_memory.json"
TOKENIZER = Path(os.environ.get("DEFT_CORPUS", ROOT.parent / "shared" / "corpus")) / "tokenizers" / "qwen2.5"
WORDS = """
the cat sat on a mat and then it went to sea with seven old friends who sang of rain
""".split()  # noqa: SIM905
FEW, SOME, MANY = 10_000, 50_000, 1_000_000
"""The first are encoded by one process, the others with helpers."""
PROCESSES = 2
KILLS = 6


def chat(draw: random.Random, number: int, words: int) -> str:
    """A line of JSON: a row of two messages."""
    question, answer = (" ".join(draw.choices(WORDS, k=words)) for _ in range(2))
    messages = [{"role": "user", "content": f"{number} {question}"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def write(path: Path, rows: int, words: int, last: str = "") -> Path:
    """A file of chats, of which `last` takes the place of the last."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows - bool(last)):
            file.write(chat(draw, number, words))
        file.write(last)
    return path


# What is measured, in a process of its own


def prepare(path: str, cache: str) -> dict[str, Any]:
    """The data half of a run from the file to the plan."""
    began = time.perf_counter()
    from deft.dataset import build, examples
    from deft.dataset.cache import Cache
    from deft.dataset.source import SourceSpec
    from deft.dataset.survey import Execution, understand
    from deft.encoding import tokenizer as edge
    from deft.encoding.render.template import choose
    from deft.encoding.rows import Policy
    from deft.plan import loader
    from deft.plan.order import Batching

    held = edge.load(str(TOKENIZER))
    chosen = choose("auto", held.chat_template, held.puts_bos, held.special_tokens)
    encoder = examples.encoder(held, chosen, Policy(max_length=512))
    execution = Execution(Cache(Path(cache), print), PROCESSES)
    loaded, before = time.perf_counter(), peak()
    understood = understand([SourceSpec(path)], execution)
    read = time.perf_counter()
    data = build.encode_sources(understood, encoder, share=0.01, execution=execution)
    encoded = time.perf_counter()
    planned = loader.make(data.train, Batching(32, None), epochs=3, seed=0, microbatch_tokens=4096)
    done = time.perf_counter()
    planned.step(planned.steps - 1)
    return {
        "rows": data.ledgers[0].rows,
        "tokens": data.ledgers[0].tokens,
        "load_libraries_and_tokenizer": loaded - began,
        "read": read - loaded,
        "encode": encoded - read,
        "plan_3_epochs": done - encoded,
        "first_batches": time.perf_counter() - done,
        "processor_seconds": sum(
            sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ),
        "own_peak_mib_before_and_after": [before, peak()],
    }


def refuse(path: str, cache: str) -> dict[str, Any]:
    """Reads a file whose last row is bad."""
    from deft.dataset.cache import Cache
    from deft.dataset.source import SourceSpec
    from deft.dataset.survey import Execution, understand

    began = time.perf_counter()
    ((_, survey),) = understand([SourceSpec(path)], Execution(Cache(Path(cache)), PROCESSES))
    seconds = time.perf_counter() - began
    gigabytes = os.path.getsize(path) / 1e9
    return {
        "rows": survey.rows,
        "gigabytes": gigabytes,
        "seconds": seconds,
        "seconds_per_gigabyte": seconds / gigabytes,
        "said": [str(problem).replace(path, "rows.jsonl") for problem in survey.refused],
    }


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# What starts the processes and looks at them


def measured(what: str, path: Path, cache: Path) -> dict[str, Any]:
    """What a fresh process says of itself, and the memory that it and its helpers had."""
    child = start(what, path, cache, subprocess.PIPE)
    most = 0.0
    while child.poll() is None:
        most = max(most, sum(resident(pid) for pid in tree(child.pid)))
        time.sleep(0.05)
    assert child.stdout is not None
    lines = child.stdout.read().splitlines()
    assert child.returncode == 0, lines
    return {**json.loads(lines[-1]), "peak_mib_with_helpers": most}


def start(what: str, path: Path, cache: Path, output: int) -> subprocess.Popen[str]:
    line = [sys.executable, __file__, "--what", what, "--path", str(path), "--cache", str(cache)]
    return subprocess.Popen(line, stdout=output, text=True)


def tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from tree(int(child))


def resident(pid: int) -> float:
    """MiB; nothing where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


def killed(path: Path, folder: Path) -> dict[str, Any]:
    """Builds that are killed when random shares of the rows are written, beside one that was not."""
    draw, found, cache, whole = random.Random(0), [], folder / "killed", folder / "some"
    size = max(each.stat().st_size for each in whole.glob("*/rows.arrow"))
    for _ in range(KILLS):
        share, earlier = draw.uniform(0.0, 1.0), set(cache.glob(".*.deft-*"))
        child = start("prepare", path, cache, subprocess.DEVNULL)
        while child.poll() is None and written(cache, earlier) < share * size:
            time.sleep(0.005)
        helpers = [pid for pid in tree(child.pid) if pid != child.pid]
        child.kill()
        time.sleep(2.0)
        alive = sum(resident(pid) > 0 for pid in helpers)
        found.append({"share": share, "ended_by": child.wait(), "helpers": len(helpers), "alive_after_2_s": alive})
    left_by_kills = [each.name for each in cache.iterdir() if each.name.startswith(".")]
    again = measured("prepare", path, cache)
    names, others = (
        {each.name: {file.name: digest(file) for file in sorted(each.iterdir())} for each in folders(root)}
        for root in (cache, whole)
    )
    left = [each.name for each in cache.iterdir() if each.name.startswith(".")]
    return {
        "kills": found,
        "debris_after_kills_and_at_the_end": [len(left_by_kills), len(left)],
        "rows": again["rows"],
        "same_bytes": names == others,
    }


def written(cache: Path, earlier: set[Path]) -> int:
    """The bytes of rows in a folder that is being written; `earlier` ones were left by others."""
    found = [each for each in cache.glob(".*.deft-*/rows.arrow") if each.parent not in earlier]
    return max((each.stat().st_size for each in found if each.exists()), default=-1)


def folders(cache: Path) -> list[Path]:
    return sorted(each for each in cache.iterdir() if each.is_dir() and not each.name.startswith("."))


def digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=MANY)
    parser.add_argument("--folder", type=Path, help="where files are written; a new one that is removed, unless named")
    for name in ("--what", "--path", "--cache"):
        parser.add_argument(name)
    given = parser.parse_args()
    if given.what:
        print(json.dumps({"prepare": prepare, "refuse": refuse}[given.what](given.path, given.cache)))
        return
    from common import machine

    cores, load = machine.pin(PROCESSES), os.getloadavg()[0]
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    try:
        few, some, many = (write(folder / f"{rows}.jsonl", rows, 12) for rows in (FEW, SOME, given.rows))
        figures: dict[str, Any] = {}
        for name, path in (("few", few), ("some", some), ("many", many)):
            for start_ in ("first", "second"):
                figures[f"{name}_{start_}"] = measured("prepare", path, folder / name)
                print(name, start_, json.dumps(figures[f"{name}_{start_}"]), flush=True)
        bad = write(folder / "bad.jsonl", given.rows, 98, '{"messages": [{"role": "asistant", "content": "Hi"}]}\n')
        figures["bad_row"] = measured("refuse", bad, folder / "bad")
        print("bad row", json.dumps(figures["bad_row"]), flush=True)
        figures["killed"] = killed(some, folder)
        print("killed", json.dumps(figures["killed"]), flush=True)
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    about = {
        "compared": f"preparing {FEW} and {given.rows} short chats with {PROCESSES} helping processes",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.described(len(cores) or PROCESSES),
        "versions": machine.versions("tokenizers", "transformers", "numpy", "torch"),
        "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    RESULTS.write_text(json.dumps({**about, **rounded(figures)}, indent=1) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
