"""How fast rows become tokens and masks: deft, TRL's dataset preparation, and the tokenizer alone.

    DEFT_PEERS_PYTHON=.../python python benchmarks/preparation_speed.py [--rows 20000] [--blocks 5]

Two data sets of chats, made of GSM8K's sentences by seed: `long` rows of 200 tokens and more (1 to 3 turns, some with a
system message), and `short` ones of 40 to 60. Each is two JSONL files. Arms, each in a fresh process, interleaved, all
kept to the same two cores; what is imported and loaded before (libraries, tokenizer) is not timed:

    deft        two processes, a file each: JSON is read, rows are understood, rendered, proven, encoded and weighted
    trl 1, 2    SFTTrainer._prepare_dataset with dataset_num_proc 1 and 2, on a data set that is already loaded; by
                default (every token is learnt), and with assistant_only_loss
    tokenizer   encode_batch on the texts that deft rendered, two threads: no JSON, no template, no masks

TRL writes its columns to a cache file, deft's processes write ids and weights to one each. Prints a table and writes
the figures; the ratios are of rows per second, block by block, and their median counts. Beside them stands the
processor time of each arm: where neighbours take turns on the cores it says more than the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path(os.environ.get("DEFT_CORPUS", ROOT.parent / "shared" / "corpus"))
RESULTS = ROOT / "benchmarks" / "results" / "preparation_speed.json"
TOKENIZER = "qwen2.5"
PROCESSES = 2
MAX_LENGTH = 4096
BATCH = 256

Figures = dict[str, float]


class Clock:
    """Seconds of wall and of processors, those of finished children included, since it was made."""

    def __init__(self) -> None:
        self._wall, self._processors = time.perf_counter(), self._used()

    def read(self) -> Figures:
        return {"seconds": time.perf_counter() - self._wall, "cpu_seconds": self._used() - self._processors}

    def _used(self) -> float:
        return sum(os.times()[:4])


# --- data ------------------------------------------------------------------------------------------------------------


def write(folder: Path, kind: str, rows: int) -> None:
    """`rows` chats in two files; kind: long or short."""
    draw = random.Random(0)
    lines = (CORPUS / "data" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    make = {"long": long_chats, "short": short_chats}[kind](draw, pairs)
    for part in range(PROCESSES):
        with (folder / f"part-{part}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(rows // PROCESSES):
                file.write(json.dumps({"messages": next(make)}, ensure_ascii=False) + "\n")


def long_chats(draw: random.Random, pairs: Sequence[tuple[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Questions with their answers, 1 to 3 turns, at least 200 tokens by a count that never says too many."""
    while True:
        chosen = draw.sample(pairs, k=draw.choice([1, 2, 2, 3]))
        if sum(len(question) + len(answer) for question, answer in chosen) >= 900:
            yield [*system(draw), *(message for pair in chosen for message in messages(*pair))]


def short_chats(draw: random.Random, pairs: Sequence[tuple[str, str]]) -> Iterator[list[dict[str, str]]]:
    """The first sentence of a question and one line of an answer, about 40 to 60 tokens with the template."""
    while True:
        question, answer = draw.choice(pairs)
        line = draw.choice(answer.split("\n"))
        question = question.partition(". ")[0]
        if 40 <= len(question) + len(line) <= 110:
            yield messages(question, line)


def system(draw: random.Random) -> list[dict[str, str]]:
    text = f"You are a teacher of class {draw.randint(1, 12)}."
    return [{"role": "system", "content": text}] if draw.random() < 0.3 else []


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# --- arms: each runs in a process of its own and prints one JSON object ----------------------------------------------


def deft_arm(folder: Path) -> Figures:
    """Two processes, each with its file."""
    import multiprocessing

    from deft.data import shapes, sources  # noqa: F401  as the other arms do, it imports before the clock runs
    from deft.encoding.rows import RowEncoder

    encoder: RowEncoder = deft_encoder()
    context = multiprocessing.get_context("fork")
    clock = Clock()
    with context.Pool(PROCESSES, initializer=_hold, initargs=(encoder,)) as pool:
        counts = pool.map(_encode_file, sorted(map(str, folder.glob("part-*.jsonl"))), chunksize=1)
        pool.close()
        pool.join()
    return {**clock.read(), "rows": sum(n for n, _ in counts), "tokens": sum(n for _, n in counts)}


def deft_encoder() -> Any:
    from deft.dataset import examples
    from deft.encoding import tokenizer as edge
    from deft.encoding.render.template import choose
    from deft.encoding.rows import Policy

    held = edge.load(str(CORPUS / "tokenizers" / TOKENIZER))
    chosen = choose("auto", held.chat_template, held.puts_bos, held.special_tokens)
    return examples.encoder(held, chosen, Policy(max_length=MAX_LENGTH))


_HELD: list[Any] = []


def _hold(encoder: Any) -> None:
    _HELD.append(encoder)


def _encode_file(path: str) -> tuple[int, int]:
    """Encodes one file and writes its ids and weights; how many rows and tokens."""
    from deft.data import shapes, sources
    from deft.data.format import Choices

    conversations: list[Any] = []
    rows = tokens = 0
    with Path(path + ".ids").open("wb") as ids, Path(path + ".weights").open("wb") as weights:

        def flush() -> tuple[int, int]:
            found = [part for row in _HELD[0].encode_many(conversations) for each in row.examples for part in each]
            for part in found:
                part.tokens.tofile(ids)
                part.weights.tofile(weights)
            conversations.clear()
            return len(found), sum(len(part.tokens) for part in found)

        for outcome in shapes.Reader(path, "auto", Choices()).each(sources.read(path)):
            conversations += outcome.conversations
            if len(conversations) >= BATCH:
                done = flush()
                rows, tokens = rows + done[0], tokens + done[1]
        done = flush()
    return rows + done[0], tokens + done[1]


def texts_arm(folder: Path) -> Figures:
    """Not timed: the texts that deft renders, for the tokenizer's arm."""
    from deft.data import sources
    from deft.data.format import Choices
    from deft.data.shapes import Reader

    encoder = deft_encoder()
    with (folder / "texts.json").open("w", encoding="utf-8") as file:
        texts = []
        for path in sorted(folder.glob("part-*.jsonl")):
            for outcome in Reader(str(path), "auto", Choices()).each(sources.read(str(path))):
                for row in outcome.conversations:
                    weights = [float(message.role == "assistant") for message in row.messages]
                    texts += [each.text for each in encoder.renderer.render(row.messages, weights)]
        json.dump(texts, file)
    return {"rows": len(texts)}


def tokenizer_arm(folder: Path) -> Figures:
    """`encode_batch` of all texts in one call."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CORPUS / "tokenizers" / TOKENIZER / "tokenizer.json"))
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    clock = Clock()
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    times = clock.read()
    lengths = [len(encoding.ids) for encoding in encodings]
    return {**times, "rows": len(texts), "tokens": sum(lengths), "shortest": min(lengths)}


def trl_arm(folder: Path, processes: int, masks: bool) -> Figures:
    """TRL's own preparation, with the attributes of a trainer that it reads and without a model."""
    from types import SimpleNamespace

    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizers" / TOKENIZER)
    files = sorted(map(str, folder.glob("part-*.jsonl")))
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(folder / "loaded"))
    config = SFTConfig(
        str(folder / "out"),
        dataset_num_proc=processes,
        assistant_only_loss=masks,
        max_length=MAX_LENGTH,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    template = get_training_chat_template(tokenizer) if masks else None
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=False)
    clock = Clock()
    done = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, config, False, None, "train")
    return {**clock.read(), "rows": len(done), "tokens": sum(map(len, done["input_ids"]))}


ARMS: dict[str, tuple[str, Callable[[Path], Figures]]] = {
    "deft": ("deft", deft_arm),
    "tokenizer": ("deft", tokenizer_arm),
    "trl 1": ("trl", lambda folder: trl_arm(folder, 1, False)),
    "trl 2": ("trl", lambda folder: trl_arm(folder, 2, False)),
    "trl 1, masks": ("trl", lambda folder: trl_arm(folder, 1, True)),
    "trl 2, masks": ("trl", lambda folder: trl_arm(folder, 2, True)),
}
"""Each arm: whose environment it runs in, and what it does."""


# --- the comparison --------------------------------------------------------------------------------------------------


def run(arm: str, folder: Path, peers: str) -> Figures:
    """One arm in a fresh process."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "HF_DATASETS_CACHE": str(folder / f"cache-{time.monotonic_ns()}"),
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": str(PROCESSES),
        "TOKENIZERS_PARALLELISM": "true" if arm == "tokenizer" else "false",
    }
    python = peers if arm.startswith("trl") else sys.executable
    command = [python, __file__, "--arm", arm, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(kind: str, rows: int, blocks: int, peers: str) -> dict[str, Any]:
    """All arms on one data set, `blocks` times, in turns that go forth and back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, kind, rows)
        run("texts", folder, peers)
        found: dict[str, list[Figures]] = {arm: [] for arm in ARMS}
        for block in range(blocks):
            for arm in list(ARMS)[:: 1 if block % 2 == 0 else -1]:
                found[arm].append(run(arm, folder, peers))
                print(f"{kind} block {block + 1}: {arm:14} {found[arm][-1]['seconds']:7.2f} s", flush=True)
    return {
        "rows": rows,
        "tokens_per_row": found["tokenizer"][0]["tokens"] / rows,
        "shortest_row": found["tokenizer"][0]["shortest"],
        "seconds": {arm: [round(each["seconds"], 3) for each in runs] for arm, runs in found.items()},
        "rows_per_second": {arm: round(rows / middle(runs)) for arm, runs in found.items()},
        "cpu_seconds": {arm: [round(each["cpu_seconds"], 3) for each in runs] for arm, runs in found.items()},
        "tokens_per_second": {arm: round(runs[0]["tokens"] / middle(runs)) for arm, runs in found.items()},
        "deft_over": {arm: ratio(found["deft"], runs) for arm, runs in found.items() if arm != "deft"},
        "deft_over_by_cpu": {
            arm: ratio(found["deft"], runs, "cpu_seconds") for arm, runs in found.items() if arm != "deft"
        },
    }


def middle(runs: Sequence[Figures]) -> float:
    return statistics.median(each["seconds"] for each in runs)


def ratio(ours: Sequence[Figures], others: Sequence[Figures], key: str = "seconds") -> dict[str, float]:
    """deft's rows per second over an arm's, block by block."""
    each = sorted(other[key] / our[key] for our, other in zip(ours, others, strict=True))
    return {"median": round(statistics.median(each), 3), "least": round(each[0], 3), "most": round(each[-1], 3)}


def table(kind: str, found: dict[str, Any]) -> str:
    lines = [
        f"\n{kind}: {found['rows']} rows of {found['tokens_per_row']:.0f} tokens, {found['shortest_row']} and more"
    ]
    lines.append(f"{'':16}{'rows/s':>10}{'tokens/s':>12}   deft is")
    for arm, rate in found["rows_per_second"].items():
        over = found["deft_over"].get(arm)
        by_cpu = found["deft_over_by_cpu"].get(arm, {}).get("median", 0)
        times = f"   {over['median']:.2f}x ({over['least']:.2f} to {over['most']:.2f})" if over else ""
        times += f"   {by_cpu:.2f}x by processor time" if over else ""
        lines.append(f"{arm:16}{rate:>10,}{found['tokens_per_second'][arm]:>12,}{times}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="short chats; of long ones half as many")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=["long", "short"])
    parser.add_argument("--arm")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.arm:
        arm = texts_arm if given.arm == "texts" else ARMS[given.arm][1]
        print(json.dumps(arm(given.folder)))
        return
    from common import machine

    cores = machine.pin(PROCESSES)
    peers = os.environ["DEFT_PEERS_PYTHON"]
    load = os.getloadavg()[0]
    rows = {"long": given.rows // 2, "short": given.rows}
    found = {kind: compare(kind, rows[kind], given.blocks, peers) for kind in given.kinds}
    for kind, figures in found.items():
        print(table(kind, figures))
    query = "import importlib.metadata as m; print({n: m.version(n) for n in ('trl', 'datasets', 'tokenizers')})"
    theirs = subprocess.run([peers, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    about = {
        "compared": "rows per second of data preparation on two cores; ratios are medians over interleaved blocks",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.described(len(cores) or PROCESSES),
        "versions": {"deft": machine.versions("tokenizers", "transformers", "numpy", "jinja2"), "peers": theirs},
        "tokenizer": TOKENIZER,
        "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    RESULTS.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
