"""What the benchmarks rest on: the arithmetic, the rows, the equality gate, the table."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "cpu"))

import run
import table
from common import workloads
from common.shapes import SHAPES, flops
from common.stats import paired_ratio, quartiles
from gate import judge


def test_the_flops_of_the_reference_model() -> None:
    shape = SHAPES["40m"]
    body, head = 6 * 8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1408), 6 * 512 * 32_000
    assert flops(shape, [(1, 0)]) == body + 14 * 512 * 8
    assert flops(shape, [(1, 1)]) - flops(shape, [(1, 0)]) == head
    assert flops(shape, [(100, 0)]) - 100 * body == 14 * 5050 * 512 * 8
    assert shape.parameters == body / 6 + head / 6


@pytest.mark.parametrize("name", ["generated", "uniform"])
def test_rows_are_the_same_each_time_and_what_they_are_called(name: str) -> None:
    found = workloads.rows(name, 2000, 32_000, None)
    assert found[:5] == workloads.rows(name, 5, 32_000, None)
    assert all(workloads.FIRST <= min(row.ids[:-1]) <= max(row.ids) < 32_000 for row in found)
    assert all(row.ids[-1] == workloads.EOS and len(row.labels) == len(row.ids) for row in found)
    lengths = [len(row.ids) for row in found]
    learnt = sum(len(row.learnt) for row in found) / sum(lengths)
    if name == "uniform":
        assert set(lengths) == {1024}
        assert learnt == 1023 / 1024
    else:
        assert sum(lengths) / len(lengths) == pytest.approx(256, rel=0.05)
        assert learnt == pytest.approx(0.4, abs=0.01)


def side(folder: Path, error: float, loss: float = 2.0) -> Path:
    """What an arm leaves: gradients of two tensors that are off by this relative error, and a loss."""
    folder.mkdir()
    exact = {"a": torch.arange(1.0, 9.0), "b": torch.full((3,), 1e-3)}
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    wrong = {name: each * (1 + error * noise[: len(each)]) for name, each in exact.items()}
    save_file(wrong, folder / "gradients.safetensors")
    (folder / "loss.json").write_text(json.dumps(loss))
    return folder


def test_the_gate_lets_through_what_is_equal_only(tmp_path: Path) -> None:
    exact, hf = side(tmp_path / "exact", 0.0), side(tmp_path / "hf", 1e-2)
    near, far = side(tmp_path / "near", 5e-6), side(tmp_path / "far", 2e-5)
    lost, worse = side(tmp_path / "lost", 0.0, loss=2.0001), side(tmp_path / "worse", 1.1e-2)
    assert judge(near, None, exact, hf, exact).passed
    assert judge(near, hf, exact, hf, exact).passed
    assert judge(far, None, exact, hf, exact).why == "fp32 differs by more than 1e-05"
    assert not judge(lost, None, exact, hf, exact).passed
    assert judge(near, worse, exact, hf, exact).why == "bf16 is further off than Hugging Face's"


def test_ratios_are_of_the_same_block() -> None:
    assert paired_ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == (2.0, 2.0, 2.0)
    middle, low, high = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert low <= middle == 3.0 <= high
    assert quartiles([3.0, 1.0, 2.0]) == (1.5, 2.5)


def test_a_turn_over_which_the_machine_changed_is_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def turn(speed: float) -> run.Turn:
        return run.Turn("deft", 0, speed, speed, float("nan"), float("nan"), 0, 0.0, ())

    cell = run.Cell("15m", "generated", examples_per_step=2, warmup=1, steps=1)
    rows = workloads.rows("generated", 4, 32_000, None)
    rates, turns = iter([130e9, 132e9, 190e9, 100e9]), iter([turn(500.0), turn(600.0), turn(700.0), turn(800.0)])
    monkeypatch.setattr(run, "probe", lambda shape: run.Probe(next(rates), 1.0))
    monkeypatch.setattr(run, "measure", lambda *arguments: next(turns))
    clock = run.Clock([run.Probe(100e9, 1.0)], [])
    options = Namespace(drift=0.1, retries=2)
    kept = run.steady_turn(cell, "deft", 0, tmp_path, rows, clock, options)
    assert kept is not None
    assert (kept.tokens_per_second, kept.gemm_flops) == (600.0, 131e9)
    needed = flops(SHAPES["15m"], [row.size for row in rows[2:]]) / sum(len(row.ids) for row in rows[2:])
    assert kept.gemm_share == pytest.approx(600.0 * needed / 131e9)
    assert clock.dropped == [("deft", 0.261)]
    assert run.steady_turn(cell, "deft", 1, tmp_path, rows, clock, options) is None


def test_the_table_stands_between_its_marks(tmp_path: Path) -> None:
    def spread(value: float) -> dict[str, object]:
        return {"median": value, "quartiles": [value, value]}

    arm = {name: spread(0.5) for name in ("tokens_per_second", "targets_per_second", "gemm_share", "peak_bytes")}
    ratio = {"deft_times_faster": {"median": 5.25, "interval_95": [5.0, 5.5]}}
    cell = {
        "arms": {"deft": arm, "trl_default": arm | ratio},
        "machine": {"threads": 2, "cpu": "some CPU"},
        "versions": {"deft": {"torch": "2.13.0"}, "peers": {"trl": "1.16.0"}},
        "date": "2026-11-21",
        "blocks_kept": 4,
    }
    results, readme = tmp_path / "results" / "cpu.json", tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.keep(results, "40m:gsm8k", cell)
    table.into_readme(readme, results)
    table.into_readme(readme, results)
    text = readme.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n| model, rows |")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text
    assert "| 40m, gsm8k | deft |" in text
    assert "(40m, gsm8k 4)" in text
    assert text.count("| 5.2x (5.0 to 5.5) |") == 1
    another = tmp_path / "results" / "cpu-other.json"
    table.keep(another, "40m:gsm8k", cell | {"machine": {"threads": 2, "cpu": "another CPU", "amx": True}})
    table.into_readme(readme, another, results)
    text = readme.read_text()
    assert text.count("\n\n| model, rows |") == 1
    assert text.index("2 cores: another CPU with AMX, torch") < text.index("`benchmarks/results/cpu-other.json`")
    assert text.index("`benchmarks/results/cpu-other.json`") < text.index("2 cores: some CPU, torch")
