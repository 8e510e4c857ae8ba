"""Bad files are refused by file, line and field with a fix, or read and reported; none ends in a traceback."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import CASES, Case
from readers import understand
from tiny_tokenizers import CHATML, byte_level

from deft.core.errors import DeftError, Problem, Problems
from deft.data import sources
from deft.dataset import build, examples, survey
from deft.dataset.source import SourceSpec
from deft.encoding.render.template import choose
from deft.encoding.rows import Policy, RowEncoder
from deft.encoding.tokenizer import wrap

MUTATIONS = int(os.environ.get("DEFT_MUTATIONS", "400"))
"""The nightly run takes 10,000."""


@pytest.fixture(scope="module")
def row_encoder() -> RowEncoder:
    tokenizer = wrap(byte_level()).with_template(CHATML)
    chosen = choose("auto", tokenizer.chat_template, tokenizer.puts_bos)
    return examples.encoder(tokenizer, chosen, Policy(max_length=512))


def test_there_are_eighty_kinds_and_each_has_its_own_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 80
    kinds = Counter(case.kind for case in CASES)
    assert kinds["error"] >= 60
    assert kinds["warning"] >= 8
    assert kinds["accepted"] >= 8


def refusals(path: str) -> list[Problem]:
    """What reading a file complains about; an error about the whole of it is one Problem."""
    try:
        return list(survey.understand([SourceSpec(path)])[0][1].refused)
    except Problems as error:
        return list(error.problems)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_file_is_treated_as_specified(case: Case, tmp_path: Path, row_encoder: RowEncoder) -> None:
    path = tmp_path / case.file
    path.write_bytes(case.content)
    found = refusals(str(path))
    if case.kind == "error":
        *heading, problem = found
        assert len(heading) <= 1, "what is wrong with the whole file, then its row"
        where = f"{path}:{case.line}" if case.line else str(path)
        assert str(problem).startswith(f"{where}: "), str(problem)
        assert case.says in str(problem), str(problem)
        assert problem.fix or "; " in problem.what, f"no fix: {problem}"
        return
    assert found == []
    (ledger,) = build.encode_sources(survey.understand([SourceSpec(str(path))]), row_encoder).ledgers
    reported = {fate for fate, count in ledger.fates.items() if count and fate != "trained"}
    reported |= {seen.name for seen in ledger.warnings if seen.name != "encoded_apart"}
    assert reported == ({case.report} if case.report else set())
    assert ledger.fates["trained"] >= 1


TROUBLE = [
    b'"', b"{", b"]", b"\\", b"null", b"NaN", b"\xff", b"\x00", b"\n", b",", b"1e999", b"-0", b"\\ud800", b"true",
    b'{"role":', b"[[", b'""', b"\xef\xbb\xbf", b"9" * 5000, b"\x1f\x8b", b"<|im_end|>",
]  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with one to five things done to it: bytes cut, doubled or changed, or trouble put in."""
    for _ in range(draw.randint(1, 5)):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice((0, 1, 3, 20, 200)))
        piece = draw.choice((b"", content[start:end] * 2, draw.choice(TROUBLE), bytes([draw.randrange(256)])))
        content = content[:start] + piece + content[end:]
    return content


def changed(value: Any, draw: random.Random) -> Any:
    """A JSON value with one of its parts replaced by something of another kind."""
    strange = [None, 7, -1.5, True, "", "x", [], {}, [None], {"role": "user"}, "[", 10**400, ["a", "b"], [[]]]
    if not isinstance(value, dict | list) or not value or draw.random() < 0.2:
        return draw.choice(strange)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    if draw.random() < 0.2:
        del copy[key]
    else:
        copy[key] = changed(value[key], draw)
    return copy


def test_random_mutations_of_files_end_in_rows_or_in_a_named_error(tmp_path: Path) -> None:
    draw, outcomes = random.Random(0), Counter[str]()
    for number in range(MUTATIONS):
        case = CASES[number % len(CASES)]
        path = tmp_path / f"{number}-{case.file}"
        path.write_bytes(mutated(case.content, draw))
        outcomes[outcome(str(path))] += 1
        path.unlink()
    assert set(outcomes) == {"read", "refused", "error"}, outcomes


def test_random_changes_of_rows_end_in_conversations_or_in_a_named_error(row_encoder: RowEncoder) -> None:
    draw, outcomes = random.Random(1), Counter[str]()
    rows = [row for case in CASES if case.file == "train.jsonl" for row in json_rows(case.content)]
    for number in range(MUTATIONS):
        row = changed(rows[number % len(rows)], draw)
        start = time.process_time()
        try:
            known = understand(sources.from_values([row]), "rows")
        except DeftError:
            outcomes["error"] += 1
            continue
        for conversation in known.conversations:
            if not (conversation.tools or any(m.tool_calls or m.reasoning for m in conversation.messages)):
                row_encoder.encode(conversation)
        outcomes["read" if known.conversations else "refused"] += 1
        assert time.process_time() - start < 2
    assert set(outcomes) == {"read", "refused", "error"}, outcomes


def outcome(path: str) -> str:
    start, message = time.process_time(), ""
    try:
        known = understand(sources.read(path), path)
    except DeftError as error:
        message = str(error)
    assert time.process_time() - start < 2
    if message:
        assert path in message
        return "error"
    assert all(problem.where.startswith(path) for problem in known.refused)
    return "refused" if known.refused else "read"


def json_rows(content: bytes) -> list[Any]:
    rows = []
    for line in content.splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return rows
