"""Every data file of the corpus trains two steps, or is refused with a reason; the ledger's fates add up to its rows.

    python benchmarks/corpus_files.py [--only NAME]

A tiny random Qwen2 with the Qwen2.5 tokenizer and its template; all rows are encoded and planned, and refused rows are
counted. Prints a table, writes benchmarks/results/corpus_files.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import deft
from deft.core.errors import DeftError

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path(os.environ.get("DEFT_CORPUS", ROOT.parent / "shared" / "corpus"))
RESULTS = ROOT / "benchmarks" / "results" / "corpus_files.json"
STEPS = 2
LENGTH = 4096


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizers" / "qwen2.5")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "max_position_embeddings": LENGTH, "tie_word_embeddings": True}
    config = Qwen2Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes, **more)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(file: Path, model: Path, folder: Path) -> dict[str, Any]:
    """What became of one file: its ledger and losses, or why it is refused."""
    began = time.perf_counter()
    settings = {"steps": STEPS, "batch": 2, "max_length": LENGTH, "data__allow_refused": 1_000_000}
    try:
        deft.train(model, str(file), output=str(folder), **settings)
    except DeftError as error:
        return {"file": file.name, "refused": str(error).replace(str(CORPUS), "corpus")[:600]}
    (ledger,) = json.loads((folder / "ledger.json").read_text())
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    fates = {fate: count for fate, count in ledger["fates"].items() if count}
    reasons = Counter(row["reason"][:120] for row in ledger["lost"])
    return {
        "file": file.name,
        "shape": ledger["shape"],
        "rows": ledger["rows"],
        "fates": fates,
        "adds up": sum(fates.values()) == ledger["rows"],
        "tokens": ledger["tokens"],
        "target_tokens": ledger["target_tokens"],
        "losses": [round(loss, 4) for loss in losses],
        "reasons": dict(reasons.most_common(4)),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose name holds this; nothing is written")
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="deft-files-") as name:
        folder = Path(name)
        model = write_model(folder / "model")
        for file in sorted(path for path in (CORPUS / "data").iterdir() if arguments.only in path.name):
            found.append(trained(file, model, folder / file.name))
            print(json.dumps(found[-1], ensure_ascii=False), flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "deft-sft")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if not arguments.only:
        report = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions, "files": found}
        RESULTS.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    is_good = all("refused" in each or (each["adds up"] and len(each["losses"]) == STEPS) for each in found)
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
