"""Peak memory from shapes alone, micro-batches that fit, the dry run, and what `deft doctor` says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import chat
from rich.console import Console
from states import state_around
from tiny_models import write_llama
from tiny_tokenizers import CHATML
from transformers import AutoModelForCausalLM, LlamaConfig

from deft.commands import doctor
from deft.core import hardware
from deft.core.errors import MemoryShort
from deft.core.hardware import Machine
from deft.core.types import Encoded, Origin, Tally
from deft.distributed.world import World
from deft.model import attention, fused_layers
from deft.model.causal_lm import CausalLM
from deft.model.checkpointing import Checkpointing
from deft.model.config import AdapterConfig
from deft.model.load import Base, inspect, skeleton
from deft.model.trainable import ALL, Trainable
from deft.plan import loader
from deft.plan.loader import Loader
from deft.plan.order import Batching
from deft.run import (
    api,
    config,
    forecast,
    prepare,
    reading,
)
from deft.run import (
    train as run,
)
from deft.run.forecast import Fit, Forecast, Share, Trace, trace
from deft.run.reading import Session
from deft.run.scaling import CHECKPOINTING, Count, Groups
from deft.training import chunked, objectives
from deft.training.chunked import Chunked
from deft.training.state import TrainState
from deft.training.step import dry_run_step

CPU = torch.device("cpu")
FP32 = Machine(CPU, torch.float32, 64)
LLAMA = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def planned(lengths: list[int], budget: int, per_step: int = 4) -> Loader:
    """Documents of these lengths, of which all but the first token are learnt."""
    draw = np.random.default_rng(0)
    examples = [
        (Encoded(Origin("rows", i), draw.integers(0, 50, n).astype(np.int32), (np.arange(n) > 0).astype(np.float32)),)
        for i, n in enumerate(lengths)
    ]
    return loader.make(examples, Batching(per_step), epochs=1, seed=0, microbatch_tokens=budget)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return inspect(str(write_llama(tmp_path / "model")))


def state_of(base: Base) -> TrainState:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, attn_implementation=attention.NAME)
    model.train()
    return state_around(CausalLM(model, "packed"), torch.float32)


# What a step takes


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_without_memory_is_that_of_the_same_step_with_it(dtype: torch.dtype, mode: Checkpointing) -> None:
    batch = planned([40, 30, 30, 20], budget=200).step(0).micro_batches[0]
    expected = trace(LLAMA, batch, chunked.NLL, replace(FP32, dtype=dtype), True, mode)
    model = AutoModelForCausalLM.from_config(LLAMA, dtype=dtype, attn_implementation=attention.NAME).train()
    fused_layers.install(model)
    with forecast.LiveBytes() as real:
        for parameter in model.parameters():
            real.see(parameter)
        own = state_around(CausalLM(model, "packed", checkpointing=mode), dtype)
        state = real.alive
        own.causal_lm(batch, chunked.NLL).nll_sum.backward()
        assert all(parameter.grad is not None for parameter in own.masters.parameters.values())
    assert expected.state_bytes == pytest.approx(state, rel=1e-3)
    assert expected.peak_bytes == pytest.approx(real.peak, rel=0.02)


def test_a_copy_of_what_the_run_began_with_counts() -> None:
    batch, kl = planned([40], budget=200).step(0).micro_batches[0], objectives.load("kl")
    plain, held = (trace(LLAMA, batch, objective, FP32, is_alone=True) for objective in (chunked.NLL, kl))
    assert held.state_bytes - plain.state_bytes == 4 * plain.parameters
    assert held.peak_bytes - plain.peak_bytes >= 4 * plain.parameters


def test_gradients_of_earlier_micro_batches_count() -> None:
    batch = planned([40], budget=200).step(0).micro_batches[0]
    machine = replace(FP32, dtype=torch.bfloat16)
    alone, summed = (trace(LLAMA, batch, chunked.NLL, machine, is_alone=is_alone) for is_alone in (True, False))
    assert summed.peak_bytes - alone.peak_bytes == pytest.approx(4 * alone.parameters, rel=0.01)


@pytest.mark.parametrize("length", [30, 400])
def test_layers_that_are_alike_need_not_all_be_looked_at(length: int) -> None:
    batch = planned([length] * 3, budget=4000).step(0).micro_batches[0]
    deep = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 9, "layer_types": ["full_attention"] * 9})
    whole, extended = (
        forecast._trace(deep, batch, chunked.NLL, FP32, True, "none", ALL),
        trace(deep, batch, chunked.NLL, FP32, True),
    )
    assert asdict(extended) == pytest.approx(asdict(whole), rel=0.01)


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_what_one_layer_takes_for_a_moment_does_not_hide_what_many_keep(mode: Checkpointing) -> None:
    learnt = (np.arange(1000) >= 900).astype(np.float32)  # A last layer does less where less is learnt.
    batch = loader.build([(np.arange(1000) % 50, learnt)])
    wide = {"intermediate_size": 1024, "num_hidden_layers": 12, "layer_types": ["full_attention"] * 12}
    deep, machine = LlamaConfig(**{**LLAMA.to_dict(), **wide}), replace(FP32, dtype=torch.bfloat16)
    whole = forecast._trace(deep, batch, chunked.NLL, machine, True, mode, ALL)
    extended = trace(deep, batch, chunked.NLL, machine, True, mode, ALL)
    assert extended.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.04)


def test_layers_that_differ_are_all_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(forecast, "_trace", lambda config, *rest: seen.append(config.num_hidden_layers))
    mixed = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})
    mixed.layer_types = ["full_attention", "sliding_attention"] * 2
    trace(mixed, planned([30], budget=64).step(0).micro_batches[0], chunked.NLL, FP32, True)
    assert seen == [4]


def test_an_architecture_that_needs_values_has_no_forecast(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def routed(*arguments: Any) -> torch.Tensor:
        return torch.ones(3).nonzero().sum()

    plan, loss = planned([10, 20], budget=64), _Objective(routed)
    found = forecast.fit(plan, base, loss, FP32, is_auto=True)  # type: ignore[arg-type]
    assert (found.planned, found.checkpointing, found.traced) == (plan, "none", None)
    assert forecast.forecast(found, FP32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_has_what_no_tensor_holds(base: Base, dtype: torch.dtype) -> None:
    machine = replace(FP32, dtype=dtype)
    fit = forecast.fit(planned([33] * 16, budget=64), base, chunked.NLL, machine, is_auto=False)
    assert fit.traced is not None
    on_cpu, elsewhere = (
        forecast.forecast(fit, replace(machine, device=torch.device(name))) for name in ("cpu", "meta")
    )
    assert on_cpu is not None
    assert elsewhere is not None
    assert elsewhere.peak_bytes == fit.traced.peak_bytes
    expected = forecast.HEAP * fit.traced.peak_bytes + forecast.BESIDE[dtype]
    assert on_cpu.peak_bytes == pytest.approx(expected, rel=1e-6)


# Micro-batches that fit


def test_the_largest_micro_batch_is_the_fullest() -> None:
    batch, is_alone = forecast.largest(planned([5, 6, 50, 7, 8, 9, 10, 11], budget=64))
    assert (max(batch.documents), is_alone) == (49, False)
    assert forecast.largest(planned([5, 6], budget=64))[1]
    two = planned([30, 40], budget=40)
    assert [forecast.largest(two, ranks)[1] for ranks in (1, 2)] == [False, True]


def memory_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: forecast.PROCESS + size)


def test_memory_is_saved_where_it_costs_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 4, "vocab_size": 60, "layer_types": None})
    config.save_pretrained(tmp_path)
    base = inspect(str(tmp_path), needs_weights=False)
    plan = planned([64] * 40, budget=2048, per_step=40)
    peaks = {}
    for tokens in (2048, 1024, 512):
        batch, is_alone = forecast.largest(replace(plan, microbatch_tokens=tokens))
        for mode in CHECKPOINTING:
            peaks[tokens, mode] = trace(config, batch, chunked.NLL, FP32, is_alone, mode).peak_bytes
    assert peaks[2048, "none"] > peaks[1024, "none"] > peaks[1024, "selective"] > peaks[1024, "full"]
    for way, peak in peaks.items():
        if way in ((1024, "none"), (512, "full")):
            memory_of(peak, monkeypatch)
            found = forecast.fit(plan, base, chunked.NLL, FP32, is_auto=True)
            assert found.traced is not None
            assert found.traced.peak_bytes <= peak
            assert (found.planned.microbatch_tokens, found.checkpointing) == way


def test_micro_batches_that_were_asked_for_stay(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned([32] * 16, budget=512, per_step=16)
    memory_of(0, monkeypatch)
    found = forecast.fit(plan, base, chunked.NLL, FP32, is_auto=False)
    assert (found.planned, found.checkpointing) == (plan, "full")


def test_what_can_never_fit_ends_with_its_exit_code(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_of(0, monkeypatch)
    with pytest.raises(MemoryShort, match="smaller max_length") as error:
        forecast.fit(planned([32] * 16, budget=512), base, chunked.NLL, FP32, is_auto=True)
    assert error.value.exit_code == 7


# What ranks share

GROUPS = Groups(layers=Count(60), largest=Count(30), root=Count(40), head=Count(20))
"""Two layers of 30 parameters, a head of 20 and 20 else, all trained."""
TWO = Share(ranks=2, shard=2, most=2)


@pytest.mark.parametrize(
    ("share", "dtype", "state", "begin", "end"),
    [
        # 12 B/P of 100 by 2; gathered 2 B/P of 40 + 2 * 30; sums 4 B/P of 50; of 30 and 40: made, sent and received
        (TWO, torch.bfloat16, 600, 600 + 200 + 200 + 30 * 6, 600 + 200 + 200 + 40 * 6),
        (replace(TWO, is_ordered=False), torch.bfloat16, 600, 600 + 200 + 200 + 30 * 6, 600 + 200 + 200 + 40 * 6),
        (replace(TWO, ranks=4), torch.bfloat16, 600, 600 + 200 + 200 + 30 * 10, 600 + 200 + 200 + 40 * 10),
        (replace(TWO, ranks=4, shard=4), torch.bfloat16, 300, 300 + 200 + 100 + 30 * 6, 300 + 200 + 100 + 40 * 6),
        (TWO, torch.float32, 600, 600 + 400 + 200 + 30 * 12, 600 + 400 + 200 + 40 * 12),
    ],
)
def test_a_rank_has_its_rows_of_the_state_and_what_it_works_at_whole(
    share: Share, dtype: torch.dtype, state: int, begin: int, end: int
) -> None:
    """With much kept for the backward pass and a moment of 7, and with little."""
    sums = 400 // share.shard
    for kept, is_alone, peak in ((1600, False, begin + 407), (1600, True, begin - sums + 407), (1210, False, end + 7)):
        traced = Trace(parameters=100, state_bytes=1200, peak_bytes=kept + 7, kept_bytes=kept, end_bytes=1200)
        found = forecast.rows_of(traced, GROUPS, replace(FP32, dtype=dtype), share, is_alone)
        assert (found.state_bytes, found.peak_bytes) == (state, peak)


def test_weights_that_are_whole_at_first_count() -> None:
    traced, parts = Trace(10, 2000, 2000, 2000, 2000), Groups(Count(0, 1000), Count(0, 10), Count(0, 10), Count())
    share = Share(ranks=100, shard=100, most=100)
    rows, read, cast = (
        forecast.rows_of(
            traced, parts, replace(FP32, dtype=torch.bfloat16), replace(share, whole_in=dtype), True
        ).peak_bytes
        for dtype in (None, torch.bfloat16, torch.float32)
    )
    assert (read, cast) == (2 * 1010, 4 * 1010)
    assert rows < read


def test_gradients_that_are_sent_are_not_kept() -> None:
    batch = planned([40], budget=200).step(0).micro_batches[0]
    kept, sent = (trace(LLAMA, batch, chunked.NLL, FP32, True, "none", ALL, shared) for shared in (False, True))
    assert (sent.state_bytes, sent.kept_bytes) == (kept.state_bytes, kept.kept_bytes)
    assert kept.end_bytes - sent.end_bytes == pytest.approx(4 * kept.parameters, rel=0.01)
    assert sent.peak_bytes < kept.peak_bytes


def test_what_fits_only_where_ranks_share_it_fits_there_and_is_named_where_they_do_not(tmp_path: Path) -> None:
    deep = {"num_hidden_layers": 12, "vocab_size": 60, "layer_types": ["full_attention"] * 12}
    LlamaConfig(**{**LLAMA.to_dict(), **deep}).save_pretrained(tmp_path)
    own, plan = inspect(str(tmp_path), needs_weights=False), planned([16] * 4, budget=64)

    def fit(share: Share, memory: int) -> Fit:
        given = replace(share, memory=forecast.PROCESS + memory)
        return forecast.fit(plan, own, chunked.NLL, FP32, is_auto=True, share=given)

    whole, rows = (fit(share, 2**40).traced for share in (Share(ranks=2, most=2), TWO))
    assert whole is not None
    assert rows is not None
    assert rows.state_bytes == pytest.approx(whole.state_bytes / 2, rel=1e-3)
    assert rows.peak_bytes < 0.9 * whole.peak_bytes
    assert fit(TWO, rows.peak_bytes).checkpointing == "none"
    with pytest.raises(MemoryShort, match=r"max_length, or share one copy .* \(shard=2\), or train an adapter"):
        fit(Share(ranks=2, most=2), rows.peak_bytes)
    for share, memory in ((Share(ranks=2, most=2), 0), (Share(ranks=2), rows.peak_bytes)):
        with pytest.raises(MemoryShort, match="smaller max_length, or train an adapter"):
            fit(share, memory)


def test_what_is_too_large_says_what_a_rank_would_hold(base: Base) -> None:
    count = Groups.of(*skeleton(base, ALL)).whole.trained / 2**30
    whole, rows = (forecast.too_large(base, FP32, ALL, share) for share in (Share(ranks=2, most=2), TWO))
    assert f"needs {16 * count:.1f} GiB" in whole
    assert "on each of 2 ranks; take a smaller model, or share one copy between the ranks (shard=2), or train" in whole
    assert f"needs {8 * count:.1f} GiB" in rows
    assert "shard=" not in rows
    assert forecast.ways_out(Trainable(AdapterConfig()), TWO) == ""


# The dry run


def test_the_dry_run_changes_nothing(base: Base) -> None:
    state = state_of(base)
    before = {name: weight.clone() for name, weight in state.causal_lm.model.state_dict().items()}
    drawn = torch.get_rng_state()
    dry_run_step(state, planned([20, 30], budget=64).step(0).micro_batches[0], chunked.NLL)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in state.causal_lm.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in state.causal_lm.model.state_dict().items())


def test_a_dry_run_that_does_not_fit_leaves_nothing_behind(base: Base) -> None:
    def greedy(hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return _Greedy.apply(hidden)

    state, loss = state_of(base), _Objective(greedy)
    with pytest.raises(torch.OutOfMemoryError):
        dry_run_step(state, planned([20, 30], budget=64).step(0).micro_batches[0], loss)
    assert all(parameter.grad is None for parameter in state.causal_lm.model.parameters())


class _Objective(Chunked):
    """The objective with another loss."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        self._loss = loss

    def __call__(self, *arguments: Any) -> Tally:
        return replace(super().__call__(*arguments), nll_sum=self._loss(*arguments))


class _Greedy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError


def test_a_run_that_may_not_fit_is_tried_first_and_says_what_would(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run, "dry_run_step", full)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('"one two three four"\n' * 8)
    settings: dict[str, Any] = {"epochs": 1, "microbatch_tokens": 512, "device": "cpu"}
    model = write_llama(tmp_path / "model")
    api.train(model, rows, output=str(tmp_path / "safe"), **settings)
    monkeypatch.setattr(Forecast, "is_safe", False)
    with pytest.raises(MemoryShort, match="microbatch_tokens=256") as error:
        api.train(model, rows, output=str(tmp_path / "unsafe"), **settings)
    assert error.value.exit_code == 7


def test_what_is_the_same_is_traced_once_and_what_differs_again(tmp_path: Path, monkeypatch: Any) -> None:
    model = write_llama(tmp_path / "model", chat_template=CHATML)
    asked = {"model": str(model), "batch": {"examples": 4}, "device": "cpu", "precision": "fp32"}

    def fit(rows: int = 10, lr: float = 1e-5, ranks: int = 1, **settings: Any) -> Fit:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text("".join(json.dumps(chat(f"What is {n}?", "It is big. " * n)) + "\n" for n in range(1, rows)))
        made = config.make({**asked, "data": {"train": str(path)}, "optimizer": {"lr": lr}, **settings})
        session = Session(console=Console(file=io.StringIO()), world=World(0, ranks))
        checked = reading.check(made, session)
        data = prepare.encode(made, checked, session)
        return prepare.plan(made, checked, data, session)

    traced, trace_once = [], forecast.trace
    monkeypatch.setattr(forecast, "trace", lambda *given: traced.append(given) or trace_once(*given))
    first = fit()
    for again in (fit(), fit(lr=1.0)):
        assert replace(again, planned=first.planned) == first
        assert again.planned.microbatch_tokens == first.planned.microbatch_tokens
    assert len(traced) == 1
    assert first.traced is not None
    for count, changed in enumerate([{"rows": 11}, {"seed": 1}, {"microbatch_tokens": 500}, {"precision": "bf16"}], 2):
        fit(**changed)
        assert len(traced) == count, changed
    for _ in range(2):
        shared = fit(ranks=2, shard=2)
        assert len(traced) == 6
        assert shared.traced is not None
        assert shared.traced.state_bytes == pytest.approx(first.traced.state_bytes / 2, rel=1e-3)
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: 2**40)
    fit()
    assert len(traced) == 7


def test_a_run_traces_its_largest_micro_batch_alone_before_it_starts(tmp_path: Path, monkeypatch: Any) -> None:
    traced, trace_once = [], forecast.trace
    monkeypatch.setattr(forecast, "trace", lambda *given: traced.append(given) or trace_once(*given))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "one two three " * n}) + "\n" for n in (1, 9, 17)))
    asked: dict[str, Any] = {"batch": 1, "microbatch_tokens": 64, "device": "cpu", "precision": "fp32"}
    api.train(write_llama(tmp_path / "model"), rows, output=str(tmp_path / "run"), **asked)
    assert len(traced) == 1


def test_a_forecast_far_below_memory_needs_no_dry_run() -> None:
    assert Forecast(0, 4, 8, "none").is_safe
    assert not Forecast(0, 5, 8, "none").is_safe


# The machine


def test_the_memory_is_what_the_process_may_use() -> None:
    assert 2**28 < hardware.memory_bytes(CPU) < 2**50


def test_the_doctor_says_what_the_machine_is_and_measures_no_speed_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.run()
    said = capsys.readouterr().out
    assert hardware.describe(hardware.device("auto")) in said
    assert "GiB free here" in said
    assert "This machine is fit." in said
    assert "deft check --time" in said
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: 2**30)
    doctor.run()
    said = capsys.readouterr().out
    assert "trouble: less than 4 GiB of memory" in said
    assert "This machine is fit." not in said
