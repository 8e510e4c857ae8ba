"""What was measured, as lines for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks/cpu: begin -->", "<!-- benchmarks/cpu: end -->"
NAMES = {
    "deft": "deft",
    "deft_bf16": "deft, precision bf16",
    "deft_fp32": "deft, precision fp32",
    "trl_default": "TRL, defaults",
    "trl_grouped": "TRL, grouped by length, no checkpointing",
    "trl_packed": "TRL, packed (bfd), batch 1, no checkpointing",
    "hf_padded": "transformers' Trainer, padded, fp32",
    "loop_packed_fp32": "plain packed loop, fp32 (as torchtune's)",
}


def of_cell(name: str, cell: Mapping[str, Any]) -> str:
    """A cell for the terminal."""
    rows = f"{cell['mean_tokens']:.0f} tokens a row, {cell['target_share']:.0%} learnt"
    rates = f"GEMM {cell['gemm_gflops']['bf16']:.0f} GFLOP/s in bf16, {cell['gemm_gflops']['fp32']:.0f} in fp32"
    lines = [f"{name}: {cell['blocks_kept']} blocks, {rows}; {rates}"]
    for arm, found in cell["arms"].items():
        real, target = found["tokens_per_second"], found["targets_per_second"]
        low, high = real["quartiles"]
        lines.append(
            f"  {arm:18} {real['median']:8,.0f} real tok/s ({low:,.0f} to {high:,.0f}) {target['median']:8,.0f} target"
            f"  {found['gemm_share']['median']:5.1%}  {found['peak_bytes']['median'] / 2**20:7,.0f} MiB"
            f"  first step {found['first_step_seconds']['median']:5.1f} s  {_ratio(arm, found)}"
        )
    lines += [f"  {arm:18} {why}" for arm, why in cell["failures"].items()]
    return "\n".join(lines)


def _ratio(arm: str, found: Mapping[str, Any]) -> str:
    if arm == "deft" or "deft_times_faster" not in found:
        return ""
    times, (low, high) = found["deft_times_faster"]["median"], found["deft_times_faster"]["interval_95"]
    return (
        f"deft is {times:.2f}x as fast ({low:.2f} to {high:.2f}), with {found['deft_memory_ratio']:.2f} of the memory"
    )


def keep(path: Path, name: str, cell: Mapping[str, Any]) -> None:
    """Puts a cell in the results file; others stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    cells[name] = cell
    path.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")


def into_readme(readme: Path, *results: Path) -> None:
    """Writes a table of each file between the marks; a README without them stays as it is."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        tables = [_markdown(json.loads(path.read_text(encoding="utf-8")), path.name) for path in results]
        body = "\n\n".join("\n".join(lines) for lines in tables)
        readme.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


def _markdown(cells: Mapping[str, Any], file: str) -> Iterator[str]:
    yield "| model, rows | | target tokens/s | real tokens/s | of the GEMM rate | peak memory | deft is faster |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for name, cell in cells.items():
        model, _, workload = name.partition(":")
        for index, (arm, found) in enumerate(cell["arms"].items()):
            where = f"{model}, {workload}" if index == 0 else ""
            times = found.get("deft_times_faster")
            yield (
                f"| {where} | {NAMES[arm]} | {found['targets_per_second']['median']:,.0f} | "
                f"{found['tokens_per_second']['median']:,.0f} | {found['gemm_share']['median']:.0%} | "
                f"{found['peak_bytes']['median'] / 2**20:,.0f} MiB | "
                f"{'' if times is None or arm == 'deft' else _times(**times)} |"
            )
    first = next(iter(cells.values()))
    threads, peers = first["machine"]["threads"], first["versions"]["peers"]
    blocks = "; ".join(f"{name.replace(':', ', ')} {cell['blocks_kept']}" for name, cell in cells.items())
    drifts = [cell.get("drift_allowed", 0.05) for cell in cells.values()]
    dates = [cell["date"] for cell in cells.values()]
    amx = " with AMX" if first["machine"].get("amx") else ""
    when = " to ".join(sorted({min(dates), max(dates)}))
    yield ""
    yield (
        f"Medians of interleaved blocks ({blocks}) of fresh processes on {threads} cores: "
        f"{first['machine']['cpu']}{amx}, torch {first['versions']['deft']['torch']}, "
        f"TRL {peers.get('trl', 'absent')}, {when}; in brackets 95 % intervals. Turns in which the GEMM rate drifted "
        f"by more than {max(drifts):.0%} were thrown away. Spreads and all settings are in "
        f"`benchmarks/results/{file}`."
    )


def _times(median: float, interval_95: tuple[float, float]) -> str:
    """
    >>> _times(5.79, (5.09, 6.09))
    '5.8x (5.1 to 6.1)'
    """
    return f"{median:.1f}x ({interval_95[0]:.1f} to {interval_95[1]:.1f})"
