"""All chat templates of the corpus on all its chat files: proven, split or refused, and what an independent judge says.

    python benchmarks/masks.py [--rows N] [--only NAME] [--workers N]

Each template twice: with a Qwen2.5 tokenizer that has the template's own marks as special tokens, and without them.
A template's verdict is what it does to plain chats (words of system, user and assistant alone) that transformers itself
renders with it: "refused" where one of them is refused, else "split" where one takes several texts, else "proven". A
refused template is tried again with each named choice, until one trains all its plain chats. The judge, and the masks
broken on purpose that it must catch, are those of the tests (tests/mask_oracle.py). Writes results/masks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import mask_cases as cases  # noqa: E402
from mask_oracle import Call, Judge, shaped  # noqa: E402

from deft.core.types import Conversation, Fate  # noqa: E402
from deft.encoding.rows import EncodedRow, RowEncoder  # noqa: E402
from deft.encoding.tokenizer import Tokenizer  # noqa: E402

CORPUS = Path(os.environ.get("DEFT_CORPUS", ROOT.parent / "shared" / "corpus"))
RESULTS = ROOT / "benchmarks" / "results" / "masks.json"
FEWER = {
    "tau_gpt4o_airline_trajectories.json": 1,
    "reason_tool_use_demo_50.jsonl": 3,
    "glaive_toolcall_en_demo.json": 4,
}
"""So many of the shorter chats of these files: long ones cost up to a second each where templates need many tries."""

CONTROLS = ("identity.json", "fastchat_dummy_conversation.json", "glaive_toolcall_en_demo.json")
"""The first row of each of these is broken on purpose."""

HOSTILE = {
    "chatml": "chujiezheng/chatml",
    "qwen3": "trl/qwen3",
    "llama 2": "chujiezheng/llama-2-chat",
    "llama 3": "axolotl/llama3",
    "mistral": "axolotl/mistral_v2v3",
    "gemma": "chujiezheng/gemma-it",
    "gemma 4": "axolotl/gemma4",
    "deepseek": "xinference/deepseek-chat",
    "cohere": "trl/cohere2",
    "phi": "mistral.rs/phi3",
    "glm": "xinference/glm4-0414",
    "gpt-oss": "llama.cpp/openai-gpt-oss-120b",
}
WHY_IDS_DIFFERED = (
    "deft's ids are those of apply_chat_template for all three families. What differs in every row is the rendered"
    " text put through the tokenizer again, where the tokenizer itself begins a text with BOS: a second BOS. gpt-oss"
    " puts none; there the last mark differs: <|return|> after the last answer, <|end|> in history, so that a chat of"
    " several answers is split. gpt2's tokenizer (Llama 3.2) takes the two line breaks"
    " after the header as one token at inference and as two before a word: cut at the edge by law 2, and counted."
    " The three families' own tokenizers are not in the corpus, so which of this the prototype met is inferred."
)
UNEXPLAINED = {
    "Llama 3.2": ("vllm/tool_chat_template_llama3.2_json", "<|eot_id|>"),
    "Mistral v7": ("axolotl/mistral_v7_tekken", "</s>"),
    "gpt-oss": ("llama.cpp/openai-gpt-oss-120b", "<|return|>"),
}


@dataclass
class Found:
    """What became of some rows under one template and tokenizer."""

    counts: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    ids: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unjust: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return next((kind for kind in ("refused", "split", "proven") if self.plain[kind]), "renders no plain chat")

    def as_json(self) -> dict[str, Any]:
        shown = {"plain": self.plain, "all": self.counts, "reasons": self.reasons, "notes": self.notes, "ids": self.ids}
        return {"verdict": self.verdict, **shown, "wrong": self.wrong[:3], "unjust": self.unjust}


def look(encoder: RowEncoder, judge: Judge, rows: Mapping[str, Sequence[Conversation]]) -> Found:
    """Encodes rows and judges them."""
    found = Found()
    for name, conversations in rows.items():
        for number, conversation in enumerate(conversations):
            row = encoder.encode(conversation)
            _count(found, row, judge)
            if number == 0 and name in CONTROLS and row.fate == Fate.TRAINED:
                _break(found, row, judge)
    return found


def _count(found: Found, row: EncodedRow, judge: Judge) -> None:
    kind = cases.verdict(row)
    if kind == "refused":
        found.reasons[_brief(row.reason)] += 1
        kind = "raises" if cases.raises(row, judge) else kind
    found.counts[kind] += 1
    found.plain[kind] += cases.is_plain(row.conversation)
    found.notes.update(row.notes)
    problems = [problem.rpartition("/")[2] for problem in cases.judged(row, judge)]
    if row.fate == Fate.TRAINED:
        found.wrong += problems
    else:
        found.unjust += problems
    if kind == "proven":
        ids = cases.compare_ids(row, judge)
        found.ids[ids.skipped or ("equal" if ids.is_equal else "unequal")] += 1


def _break(found: Found, row: EncodedRow, judge: Judge) -> None:
    source, parts = cases.as_openai(row.conversation), cases.parts_of(row)
    for name, broken in cases.broken(parts):
        found.broken[name] += 1
        found.missed[name] += not judge.wrong(source, broken, row.notes)


def _brief(reason: str) -> str:
    """A reason without what differs from row to row."""
    reason = re.sub(r"messages\[\d+\]", "messages[i]", reason)
    reason = re.sub(r"\(('.*?'|\".*?\") is left\)", "(some is left)", reason)
    return re.sub(r" where the conversation has .*", " where the conversation has an answer", reason)[:150]


def template_found(entry: Mapping[str, Any], rows: Mapping[str, Sequence[Conversation]]) -> dict[str, Any]:
    """One template on all files, with and without its marks as special tokens."""
    found: dict[str, Any] = {"name": entry["name"], "renders_plain": entry["renders_plain"]}
    for setting, marks in (("with marks", entry["template"]), ("without", "")):
        made = cases.tokenizer(CORPUS, marks_of=marks)
        encoder = cases.row_encoder(entry["template"], made)
        seen = look(encoder, Judge(entry["template"], made), rows)
        found[setting] = seen.as_json()
        found[setting] |= {"wrong_count": len(seen.wrong), "broken": seen.broken, "missed": seen.missed}
        if seen.verdict == "refused":
            found[setting]["trained by"] = _trained_by(encoder, rows)
    return found


def _trained_by(encoder: RowEncoder, rows: Mapping[str, Sequence[Conversation]]) -> dict[str, Any]:
    chosen = cases.trained_by(encoder, [row for each in rows.values() for row in each if cases.is_plain(row)])
    return {"choice": chosen.words, **chosen.verdicts, "wrong": chosen.wrong} if chosen else {"choice": None}


def hostile_found(family: str) -> dict[str, Any]:
    """200 hostile contents in one family's template: rows whose control tokens are not those of a clean row."""
    source = next(each["template"] for each in cases.templates(CORPUS) if each["name"] == HOSTILE[family])
    made = cases.tokenizer(CORPUS, marks_of=source)
    encoder = cases.row_encoder(source, made)
    marks = [mark for mark in Tokenizer(made).special_tokens if mark not in ("<think>", "</think>")]
    clean = cases.controls(encoder.encode(cases.chat("Hello", "Well, hello")), made)
    rows = [encoder.encode(cases.chat(text, f"Well, {text} it is")) for text in cases.hostile(marks, 200)]
    trained = [row for row in rows if row.fate == Fate.TRAINED]
    bad = [row.conversation.messages[0].content for row in trained if cases.controls(row, made) != clean]
    refused = Counter(_brief(row.reason) for row in rows if row.fate != Fate.TRAINED)
    return {
        "family": family,
        "contents": len(rows),
        "trained": len(trained),
        "with control tokens": bad,
        **{"refused": refused},
    }


def explained(corpus: Path) -> list[dict[str, Any]]:
    """The three families whose ids a prototype found to differ, with the tokenizers of the corpus."""
    sources = {each["name"]: each["template"] for each in cases.templates(corpus)}
    rows = [row for each in cases.chats(corpus, FEWER, 8).values() for row in each if cases.is_plain(row)]
    found = []
    for family, (name, eos) in UNEXPLAINED.items():
        for kind in ("qwen2.5", "mistral-v1", "mistral-v3", "gpt2", "minimind"):
            made = cases.tokenizer(corpus, kind, sources[name])
            made.eos_token = eos if eos in made.get_vocab() else made.eos_token
            encoder = cases.row_encoder(sources[name], made)
            found.append({"family": family, "tokenizer": kind, **_suspects(encoder, Judge(sources[name], made), rows)})
    return found


def _suspects(encoder: RowEncoder, judge: Judge, rows: Sequence[Conversation]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in map(encoder.encode, rows):
        source = cases.as_openai(row.conversation)
        if cases.verdict(row) != "proven" or row.notes or row.literal:
            continue
        messages = [shaped(message, Call()) for message in source.messages[: source.learnt[-1] + 1]]
        apply = partial(judge.tokenizer.apply_chat_template, messages, chat_template=judge.template)
        ids = cases.parts_of(row)[0][0].tolist()
        counts["clean rows"] += 1
        counts["cut at an edge (law 2)"] += row.split_at_edges
        counts["equal to apply_chat_template"] += apply(tokenize=True, return_dict=False)[: len(ids)] == ids
        again = judge.tokenizer(apply(tokenize=False))["input_ids"]
        counts["equal to tokenizer(rendered text)"] += again[: len(ids)] == ids
        counts["equal once its second BOS is taken off"] += again[1 : len(ids) + 1] == ids
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=14, help="so many rows of each file, spread over it")
    parser.add_argument("--only", default="", help="templates whose name holds this; nothing is written")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    entries = [each for each in cases.templates(CORPUS) if arguments.only in each["name"]]
    rows = cases.chats(CORPUS, FEWER, arguments.rows)
    began = time.perf_counter()
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = list(pool.map(partial(template_found, rows=rows), entries))
        hostile = list(pool.map(hostile_found, HOSTILE))
    summary = {
        **_machine(),
        "seconds": round(time.perf_counter() - began),
        "rows": {k: len(v) for k, v in rows.items()},
    }
    summary |= _summary(found, hostile)
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    if not arguments.only:
        _write(summary, found, hostile, explained(CORPUS))
    raise SystemExit(0 if not summary["wrong masks"] and not summary["broken masks missed"] else 1)


def _machine() -> dict[str, Any]:
    versions = {name: version(name) for name in ("transformers", "tokenizers", "jinja2", "deft-sft")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions}


def _summary(found: Sequence[Mapping[str, Any]], hostile: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    settings = [each[setting] for each in found for setting in ("with marks", "without")]
    totals = {
        key: _total(each[key] for each in settings) for key in ("all", "ids", "broken", "missed", "notes", "reasons")
    }
    plain = [each for each in found if each["renders_plain"]]
    verdicts = {name: Counter(each[name]["verdict"] for each in plain) for name in ("with marks", "without")}
    return {
        "wrong masks": sum(each["wrong_count"] for each in settings),
        "refusals that the judge objects to": sum(len(each["unjust"]) for each in settings),
        "templates that render a plain chat": len(plain),
        "verdicts": verdicts,
        "trained by default, %": {
            name: round(100 * (each["proven"] + each["split"]) / max(1, len(plain)), 1)
            for name, each in verdicts.items()
        },
        "refused templates": {
            each["name"]: each["with marks"]["trained by"]["choice"]
            for each in found
            if each["with marks"]["verdict"] == "refused"
        },
        "rows": totals["all"],
        "ids of clean rows in one text": totals["ids"],
        "broken masks": totals["broken"].total(),
        "broken masks missed": totals["missed"].total(),
        "hostile contents": sum(each["contents"] for each in hostile),
        "hostile contents refused": sum(each["contents"] - each["trained"] for each in hostile),
        "control tokens from content": sum(len(each["with control tokens"]) for each in hostile),
        "fallbacks": dict(totals["notes"].most_common(12)),
        "reasons": dict(totals["reasons"].most_common(20)),
    }


def _total(counters: Iterator[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counters:
        total.update(each)
    return total


def _write(summary: Any, found: Sequence[Any], hostile: Sequence[Any], ids: Sequence[Any]) -> None:
    summary = {**summary, "why ids differed": WHY_IDS_DIFFERED}
    lines = {"templates": found, "hostile": hostile, "ids of three families": ids}
    tables = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(each, ensure_ascii=False) for each in rows) + "\n]"
        for name, rows in lines.items()
    ]
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text('{\n"summary": ' + text + ",\n" + ",\n".join(tables) + "\n}\n")


if __name__ == "__main__":
    main()
