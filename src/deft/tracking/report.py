"""report.html: one self-contained page made from the files of a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deft.core import files
from deft.tracking import jsonl

WIDTH, HEIGHT = 720, 240

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: .3em .6em; border-bottom: 1px solid #ddd; vertical-align: top }}
svg {{ width: 100%; height: auto; background: #fafafa; border: 1px solid #ddd }}
pre {{ white-space: pre-wrap; background: #fafafa; padding: 1em; border: 1px solid #ddd }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def write(folder: Path) -> Path:
    """Reads the folder's files, never live objects, and writes report.html beside them. DiskError where it cannot.

    What cannot be read of them, as people edit logs, is named in its place.
    """
    page = folder / "report.html"
    body = "".join(_part(folder / name, make) for name, make in _PARTS)
    files.write_text(page, _PAGE.format(title=escape(_shown(folder.name)), body=body))
    return page


def _part(path: Path, make: Callable[[Path], str]) -> str:
    try:
        return _shown(make(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        return f"<p>{escape(_shown(f'{path.name} cannot be read ({type(error).__name__}: {error})'))}</p>"


def _metrics(path: Path) -> str:
    """Of the lines that a step has written, and no user."""
    lines = [line for line in jsonl.read(path) if line.keys() >= {"loss", "seconds", "tokens"}]
    return _summary(lines) + _curve([line["loss"] for line in lines])


def _configuration(path: Path) -> str:
    return f"<h2>Configuration</h2><pre>{escape(path.read_text(encoding='utf-8'))}</pre>"


def _summary(metrics: Sequence[dict[str, Any]]) -> str:
    if not metrics:
        return "<p>No step was run.</p>"
    seconds = sum(line["seconds"] for line in metrics)
    tokens = sum(line["tokens"] for line in metrics)
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    return (
        f"<p>{len(metrics)} steps in {seconds:.0f} s, {tokens} tokens, {tokens / max(seconds, 1e-9):.0f} a second. "
        f"Loss {_shown(first)} at the first step, {_shown(last)} at the last.</p>"
    )


def _curve(losses: Sequence[float]) -> str:
    """The loss of each step as a line, with its range written beside it."""
    finite = [loss for loss in losses if isinstance(loss, float)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    points = " ".join(
        f"{index / (len(finite) - 1) * WIDTH:.1f},{(high - loss) / max(high - low, 1e-9) * (HEIGHT - 20) + 10:.1f}"
        for index, loss in enumerate(finite)
    )
    return (
        f'<h2>Loss</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}"><polyline points="{points}" fill="none" stroke="#2563eb" '
        f'stroke-width="1.5"/><text x="6" y="16" font-size="12">{high:.3f}</text>'
        f'<text x="6" y="{HEIGHT - 4}" font-size="12">{low:.3f}</text></svg>'
    )


def _ledger(path: Path) -> str:
    sources = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (
            source["source"],
            source["rows"],
            ", ".join(f"{count} {fate}" for fate, count in source["fates"].items() if count),
            f"{source['target_tokens']} of {source['tokens']}",
        )
        for source in sources
    ]
    return "<h2>Rows</h2>" + _table(("source", "rows", "fates", "tokens learnt"), rows)


def _evaluations(path: Path) -> str:
    lines = jsonl.read(path)
    if not lines:
        return ""
    names = list(dict.fromkeys(name for line in lines for name in line))
    return "<h2>Evaluations</h2>" + _table(names, [[_shown(line.get(name, "")) for name in names] for line in lines])


def _samples(path: Path) -> str:
    lines = [line for line in jsonl.read(path) if line.keys() >= {"prompt", "output"}]
    if not lines:
        return ""
    shown = [line for line in lines if line["step"] in (lines[0]["step"], lines[-1]["step"])]
    return "<h2>Samples, first and last</h2>" + _table(
        ("step", "prompt", "answer"), [(line["step"], line["prompt"], line["output"]) for line in shown]
    )


def _table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _shown(value: Any) -> str:
    """As UTF-8 has it: half a surrogate pair is shown by its number."""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


_PARTS: tuple[tuple[str, Callable[[Path], str]], ...] = (
    ("metrics.jsonl", _metrics),
    ("ledger.json", _ledger),
    ("eval.jsonl", _evaluations),
    ("samples.jsonl", _samples),
    ("config.yaml", _configuration),
)
