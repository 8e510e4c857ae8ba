"""Peak memory and time from shapes alone, micro-batches that fit, the rehearsal, and what is measured of a machine."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from encoders import chat
from rich.console import Console
from tiny_models import write_llama
from tiny_tokenizers import CHATML
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from deft import api, calibrate, config, doctor, forecast, hardware, loader, prepare, rates, reading, run
from deft.errors import MemoryShort
from deft.forecast import Fit, Forecast, trace
from deft.hardware import Machine
from deft.loader import Loader
from deft.loss import nll
from deft.model import attention, faster
from deft.model.checkpointing import Checkpointing
from deft.model.learner import Learner
from deft.model.load import Base, inspect
from deft.optim.adamw import AdamW
from deft.plan.order import Batching
from deft.rates import Rates
from deft.reading import Session
from deft.training.rehearse import rehearse
from deft.training.state import TrainState
from deft.training.step import nll_sum
from deft.types import Encoded, Origin

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
RATES = Rates(
    machine="here",
    products={"fp32": {"flop": 1e-9, "byte": 1e-9}},
    attention={"fp32": 1e9},
    moved=1e9,
    exponents=1e9,
    operations=1e6,
    updated=1e6,
    summed=2e6,
    unseen={"fp32": {"gemm": 0.5, "batched": 0.25}},
    together={"fp32": {"parts": 1.5, "parameter": 1e-6}, "bf16": {"parts": 1.0, "parameter": 0.0}},
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
    return TrainState(Learner(model, "packed"), AdamW(model.named_parameters(), dtype=torch.float32, lr=1e-3))


# What a step takes


@pytest.mark.parametrize("mode", forecast.CHECKPOINTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_without_memory_is_that_of_the_same_step_with_it(dtype: torch.dtype, mode: Checkpointing) -> None:
    batch = planned([40, 30, 30, 20], budget=200).step(0).batches[0]
    expected = trace(LLAMA, batch, nll, replace(FP32, dtype=dtype), True, mode)
    model = AutoModelForCausalLM.from_config(LLAMA, dtype=dtype, attn_implementation=attention.NAME).train()
    faster.install(model)
    with forecast._Watch() as real:
        for parameter in model.parameters():
            real.see(parameter)
        optimizer = AdamW(model.named_parameters(), dtype=dtype, lr=1.0)
        state = real.alive
        nll_sum(Learner(model, "packed", checkpointing=mode), batch, nll).backward()
        assert all(parameter.grad is not None for parameter in optimizer.parameters.values())
    assert expected.state_bytes == pytest.approx(state, rel=1e-3)
    assert expected.peak_bytes == pytest.approx(real.peak, rel=0.02)


def test_gradients_of_earlier_micro_batches_count() -> None:
    batch = planned([40], budget=200).step(0).batches[0]
    machine = replace(FP32, dtype=torch.bfloat16)
    alone, summed = (trace(LLAMA, batch, nll, machine, is_alone=is_alone) for is_alone in (True, False))
    assert summed.peak_bytes - alone.peak_bytes == pytest.approx(4 * alone.parameters, rel=0.01)


@pytest.mark.parametrize("length", [30, 400])
def test_layers_that_are_alike_need_not_all_be_looked_at(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "CACHE", 2**12)  # none of these layers is larger than a real one
    batch = planned([length] * 3, budget=4000).step(0).batches[0]
    deep = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 9, "layer_types": ["full_attention"] * 9})
    whole, extended = forecast._trace(deep, batch, nll, FP32, True, "none"), trace(deep, batch, nll, FP32, True)
    counted = ("products", "carried", "sizes")
    found = {name: value for name, value in asdict(extended).items() if name not in counted}
    assert found == pytest.approx({name: getattr(whole, name) for name in found}, rel=0.01)
    assert dict(extended.products) == pytest.approx(dict(whole.products))
    assert dict(extended.carried) == pytest.approx(dict(whole.carried))
    assert extended.sizes == whole.sizes


@pytest.mark.parametrize("mode", forecast.CHECKPOINTING)
def test_what_one_layer_takes_for_a_moment_does_not_hide_what_many_keep(mode: Checkpointing) -> None:
    learnt = (np.arange(1000) >= 900).astype(np.float32)  # A last layer does less where less is learnt.
    batch = loader.build([(np.arange(1000) % 50, learnt)])
    wide = {"intermediate_size": 1024, "num_hidden_layers": 12, "layer_types": ["full_attention"] * 12}
    deep, machine = LlamaConfig(**{**LLAMA.to_dict(), **wide}), replace(FP32, dtype=torch.bfloat16)
    whole = forecast._trace(deep, batch, nll, machine, True, mode)
    extended = trace(deep, batch, nll, machine, True, mode)
    assert extended.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.04)
    assert extended.sizes == whole.sizes, "the last layer's rows are others than the first one's"


def test_layers_that_differ_are_all_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(forecast, "_trace", lambda config, *rest: seen.append(config.num_hidden_layers))
    mixed = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})
    mixed.layer_types = ["full_attention", "sliding_attention"] * 2
    trace(mixed, planned([30], budget=64).step(0).batches[0], nll, FP32, True)
    assert seen == [4]


def test_matrix_products_are_those_of_the_definition() -> None:
    batch = planned([129, 81], budget=208).step(0).batches[0]
    traced = trace(LLAMA, batch, nll, FP32, is_alone=True)
    body = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    products = sum(work for (kind, *_), work in traced.products.items() if kind == "gemm")
    assert products == pytest.approx(6 * (body * len(batch.tokens) + 300 * 64 * len(batch.rows)), rel=0.01)
    products += traced.products["batched", "fp32"]
    seconds = traced.seconds(RATES)
    slower = traced.seconds(replace(RATES, products={"fp32": {"flop": 3e-9, "byte": 1e-9}}))
    assert slower - seconds == pytest.approx(2 * products / 1e9)


@pytest.mark.parametrize("has_bias", [False, True])
def test_products_read_their_factors_and_write_what_they_make(has_bias: bool) -> None:
    watch, out, bias = forecast._Watch(), torch.empty(5, 7), torch.ones(7)
    with watch:
        x, weight = torch.ones(5, 4), torch.ones(7, 4)
        torch.addmm(bias, x, weight.T, out=out) if has_bias else torch.mm(x, weight.T, out=out)
        torch.bmm(x[None], weight.T[None])
    gemm, batched = ("gemm", "fp32"), ("batched", "fp32")
    assert watch.products == {gemm: 2 * 5 * 4 * 7, batched: 2 * 5 * 4 * 7}
    assert watch.carried == {gemm: 4 * (5 * 4 + 4 * 7 + 5 * 7), batched: 4 * (5 * 4 + 4 * 7 + 5 * 7)}


def test_what_is_in_the_cache_is_not_fetched_again() -> None:
    x, y = torch.ones(100), torch.ones(100)
    small, large = forecast._Watch(cache=1000), forecast._Watch(cache=1200)
    for watch in (small, large):
        watch.see(x)
        watch.see(y)
        with watch:
            z = x + y
            x.mul_(z)
    assert (small.moved, large.moved) == (1200 + 400, 1200)


def test_kernels_are_made_for_each_new_size() -> None:
    def changes(*lengths: int) -> float:
        return forecast._count(planned(list(lengths), budget=10, per_step=1)).changed

    assert changes(10, 9, 8, 7) == 1 / 4, "all are filled up to 16 tokens"
    assert changes(10, 30, 50, 30) == 1.0


def test_gradients_of_steps_of_several_micro_batches_are_summed() -> None:
    found = forecast._count(planned([10] * 7, budget=10, per_step=3))
    assert (found.tokens, found.micro_batches, found.sums) == (70, 7, 6), "the last step has one"


def test_products_of_one_size_need_one_kernel() -> None:
    watch = forecast._Watch()
    with watch:
        for count in (3, 3, 5):
            x = torch.ones(count, 4)
            x @ torch.ones(4, 4)
            x @ torch.ones(4, 4).T
            torch.bmm(x[None], x[None].transpose(1, 2))
    kinds = [kind for kind, *_ in watch.sizes]
    assert (kinds.count("gemm"), kinds.count("batched")) == (4, 2)


def test_an_architecture_that_needs_values_has_no_forecast(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def routed(*arguments: Any) -> torch.Tensor:
        return torch.ones(3).nonzero().sum()

    plan, loss = planned([10, 20], budget=64), SimpleNamespace(loss=routed)
    found = forecast.fit(plan, base, loss, FP32, is_auto=True)  # type: ignore[arg-type]
    assert (found.planned, found.checkpointing, found.traced) == (plan, "none", None)
    assert forecast.forecast(found, CPU, RATES) is None


def test_time_is_that_of_all_micro_batches_and_updates(base: Base) -> None:
    plan = planned([33] * 16, budget=64)
    fit = forecast.fit(plan, base, nll, FP32, is_auto=False, is_timed=True)
    found, unknown = forecast.forecast(fit, CPU, RATES), forecast.forecast(fit, CPU, None)
    traced = trace(AutoConfig.from_pretrained(base.path), plan.step(0).batches[0], nll, FP32, is_alone=True)
    assert [each for each, _ in fit.samples] == [traced] * 3
    assert found is not None
    assert found.seconds is not None
    assert unknown is not None
    parts = 4 * traced.parameters / 1e6 + 16 * traced.parameters / 2e6 + 16 * traced.seconds(RATES)
    unseen = 0.5 * traced.sizes["gemm", "fp32"] + 0.25 * traced.sizes["batched", "fp32"]
    assert unseen > 1.0
    besides = 16 * traced.parameters * 1e-6
    assert found.seconds == pytest.approx(1.5 * parts + besides + unseen), "all 16 micro-batches are of one size"
    assert found.tokens_per_second == pytest.approx(16 * 33 / found.seconds)
    assert unknown.tokens_per_second is None


def test_small_micro_batches_are_looked_at_as_well(base: Base) -> None:
    plan = planned([60, 50, 40, 30, 20, 10], budget=1, per_step=1)
    fit = forecast.fit(plan, base, nll, FP32, is_auto=False, is_timed=True)
    assert [trace.tokens + 1 for trace, _ in fit.samples] == [20, 40, 60]
    assert [share for _, share in fit.samples] == pytest.approx([30 / 20, 70 / 40, 110 / 60])
    alike = forecast.fit(planned([33] * 6, budget=1), base, nll, FP32, is_auto=False, is_timed=True)
    assert sum(share for _, share in alike.samples) == 6


def test_what_does_not_fit_has_a_time_as_well(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: 1)
    fit = forecast.fit(planned([60, 10], budget=1), base, nll, FP32, is_auto=False, is_timed=True)
    found = forecast.forecast(fit, CPU, RATES)
    assert found is not None
    assert (found.peak_bytes > 1, found.seconds is not None) == (True, True)


def test_a_sample_that_cannot_be_traced_leaves_the_time_open(base: Base) -> None:
    def picky(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        return nll.loss(hidden, *rest) if len(hidden) > 20 else torch.ones(3).nonzero().sum()

    loss: Any = SimpleNamespace(loss=picky)
    fit = forecast.fit(planned([60, 10], budget=1), base, loss, FP32, is_auto=False, is_timed=True)
    assert (fit.samples, fit.traced is not None) == ((), True)


def test_a_run_whose_time_is_not_asked_for_has_none(base: Base) -> None:
    fit = forecast.fit(planned([60, 10], budget=1), base, nll, FP32, is_auto=False)
    found = forecast.forecast(fit, CPU, RATES)
    assert (fit.samples, found and found.seconds) == ((), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_has_what_no_tensor_holds(base: Base, dtype: torch.dtype) -> None:
    fit = forecast.fit(planned([33] * 16, budget=64), base, nll, replace(FP32, dtype=dtype), is_auto=False)
    assert fit.traced is not None
    on_cpu, elsewhere = (forecast.forecast(fit, torch.device(name), None) for name in ("cpu", "meta"))
    assert on_cpu is not None
    assert elsewhere is not None
    assert elsewhere.peak_bytes == fit.traced.peak_bytes
    beside = forecast.BESIDE[forecast.PRECISIONS[dtype]]
    assert on_cpu.peak_bytes == pytest.approx(forecast.HEAP * fit.traced.peak_bytes + beside, rel=1e-6)


# Micro-batches that fit


def test_the_largest_micro_batch_is_the_fullest() -> None:
    batch, is_alone = forecast.largest(planned([5, 6, 50, 7, 8, 9, 10, 11], budget=64))
    assert (max(batch.documents), is_alone) == (49, False)
    assert forecast.largest(planned([5, 6], budget=64))[1]


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
        for mode in forecast.CHECKPOINTING:
            peaks[tokens, mode] = trace(config, batch, nll, FP32, is_alone, mode).peak_bytes
    assert peaks[2048, "none"] > peaks[1024, "none"] > peaks[1024, "selective"] > peaks[1024, "full"]
    for way, peak in peaks.items():
        if way in ((1024, "none"), (512, "full")):
            memory_of(peak, monkeypatch)
            found = forecast.fit(plan, base, nll, FP32, is_auto=True)
            assert found.traced is not None
            assert found.traced.peak_bytes <= peak
            assert (found.planned.microbatch_tokens, found.checkpointing) == way


def test_micro_batches_that_were_asked_for_stay(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned([32] * 16, budget=512, per_step=16)
    memory_of(0, monkeypatch)
    found = forecast.fit(plan, base, nll, FP32, is_auto=False)
    assert (found.planned, found.checkpointing) == (plan, "full")


def test_what_can_never_fit_ends_with_its_exit_code(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_of(0, monkeypatch)
    with pytest.raises(MemoryShort, match="smaller max_length") as error:
        forecast.fit(planned([32] * 16, budget=512), base, nll, FP32, is_auto=True)
    assert error.value.exit_code == 7


# The rehearsal


def test_the_rehearsal_changes_nothing(base: Base) -> None:
    state = state_of(base)
    before = {name: weight.clone() for name, weight in state.learner.model.state_dict().items()}
    drawn = torch.get_rng_state()
    rehearse(state, planned([20, 30], budget=64).step(0).batches[0], nll)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in state.learner.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in state.learner.model.state_dict().items())


def test_a_rehearsal_that_does_not_fit_leaves_nothing_behind(base: Base) -> None:
    def greedy(hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return _Greedy.apply(hidden)

    state, loss = state_of(base), SimpleNamespace(loss=greedy)
    with pytest.raises(torch.OutOfMemoryError):
        rehearse(state, planned([20, 30], budget=64).step(0).batches[0], loss)  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in state.learner.model.parameters())


class _Greedy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError


def test_a_run_that_may_not_fit_is_rehearsed_and_says_what_would(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run, "rehearse", full)
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

    def fit(rows: int = 10, lr: float = 1e-5, *, is_timed: bool = False, **settings: Any) -> Fit:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text("".join(json.dumps(chat(f"What is {n}?", "It is big. " * n)) + "\n" for n in range(1, rows)))
        made = config.make({**asked, "data": {"train": str(path)}, "optimizer": {"lr": lr}, **settings})
        session = Session(console=Console(file=io.StringIO()))
        checked = reading.check(made, session)
        data = prepare.encode(made, checked, checked.encoder(), session)
        return prepare.fitted(made, checked, data, prepare.plan(made, checked, data), session, is_timed=is_timed)

    traced, trace_once = [], forecast.trace
    monkeypatch.setattr(forecast, "trace", lambda *given: traced.append(given) or trace_once(*given))
    first = fit()
    for again in (fit(), fit(lr=1.0)):
        assert replace(again, planned=first.planned) == first
        assert again.planned.microbatch_tokens == first.planned.microbatch_tokens
    assert len(traced) == 1
    assert first.traced is not None
    assert first.traced.products
    for count, changed in enumerate([{"rows": 11}, {"seed": 1}, {"microbatch_tokens": 500}, {"precision": "bf16"}], 2):
        fit(**changed)
        assert len(traced) == count, changed
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: 2**40)
    fit()
    assert len(traced) == 6
    timed, count = fit(is_timed=True), len(traced)
    assert count > 7
    assert fit(is_timed=True).samples == fit().samples == timed.samples != ()
    assert len(traced) == count, "what was timed serves those who ask for less"


def test_a_run_traces_its_largest_micro_batch_alone_before_it_starts(tmp_path: Path, monkeypatch: Any) -> None:
    traced, trace_once = [], forecast.trace
    monkeypatch.setattr(forecast, "trace", lambda *given: traced.append(given) or trace_once(*given))
    monkeypatch.setattr(rates, "saved", lambda device: RATES)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "one two three " * n}) + "\n" for n in (1, 9, 17)))
    asked: dict[str, Any] = {"batch": 1, "microbatch_tokens": 64, "device": "cpu", "precision": "fp32"}
    api.train(write_llama(tmp_path / "model"), rows, output=str(tmp_path / "run"), **asked)
    assert len(traced) == 1


def test_a_forecast_far_below_memory_needs_no_rehearsal() -> None:
    assert Forecast(0, 4, 8, "none", None, None).is_safe
    assert not Forecast(0, 5, 8, "none", None, None).is_safe


# What is measured


def test_the_doctor_keeps_rates_for_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure", lambda device, seconds: replace(RATES, machine=rates.machine(device)))
    console = Console(file=io.StringIO(), width=200)
    found = doctor.run(console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "GFLOP/s" in said
    assert "GiB free here" in said
    device = hardware.device("auto")
    lines: list[str] = []
    assert asdict(calibrate.kept(device, lines.append)) == asdict(found)
    assert lines == []
    monkeypatch.setattr(rates, "machine", lambda device: "another")
    assert rates.saved(device) is None
    monkeypatch.setattr(calibrate, "measure", lambda device: found)
    assert calibrate.kept(device, lines.append) == found
    assert len(lines) == 1, "it takes long, and says so"


def test_rates_of_another_processor_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFT_CACHE", str(tmp_path))
    info = Path("/proc/cpuinfo")
    if info.exists() and "model name" in info.read_text(encoding="utf-8"):
        assert f": {hardware.cpu_name()}\n" in info.read_text(encoding="utf-8")
    rates.keep(replace(RATES, machine=rates.machine(CPU)), CPU)
    monkeypatch.setattr(hardware, "cpu_name", lambda: "another")
    assert rates.saved(CPU) is None


def test_rates_of_an_earlier_deft_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFT_CACHE", str(tmp_path))
    rates.keep(replace(RATES, machine=rates.machine(CPU)), CPU)
    assert rates.saved(CPU) is not None
    found = json.loads(rates.path(CPU).read_text(encoding="utf-8"))
    del found["together"]
    rates.path(CPU).write_text(json.dumps(found), encoding="utf-8")
    assert rates.saved(CPU) is None


def test_a_step_is_compared_with_the_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300, "num_hidden_layers": 1}
    monkeypatch.setattr(calibrate, "MODEL", {**calibrate.MODEL, **small})
    monkeypatch.setattr(calibrate, "LENGTHS", ((200, 300), (9, 12)))
    monkeypatch.setattr(calibrate, "STEPS", (4, 4))
    real, taken, clock = calibrate._step, iter([90.0, 80.0, 2.0, 4.0, 90.0, 80.0, 0.5, 1.5]), [0.0]

    def timed(*arguments: Any) -> None:
        real(*arguments)
        clock[0] += next(taken)

    monkeypatch.setattr(calibrate, "_step", timed)
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    config = AutoConfig.for_model("llama", **calibrate.MODEL)
    traced = [trace(config, calibrate._batch(each), nll, FP32, is_alone=True) for each in calibrate.LENGTHS]
    parts = [each.seconds(RATES) + each.parameters / RATES.updated for each in traced]
    before = torch.random.get_rng_state()
    found = calibrate._together(RATES, "fp32", CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    together = [found["parts"] * part + found["parameter"] * traced[0].parameters for part in parts]
    assert together == pytest.approx([3.0, 1.0])
    assert found["parameter"] > 0.0


def test_where_layers_are_compiled_parts_are_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "measure", lambda device, seconds: RATES)
    assert calibrate.measure(torch.device("cuda")) == RATES


def test_what_would_be_emulated_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "measure", lambda device, seconds: RATES)
    monkeypatch.setattr(calibrate, "_together", lambda found, precision, device: {"parts": 2.0})
    two = {"parts": 2.0}
    for has_bf16, together in [(True, {"fp32": two, "bf16": two}), (False, {**RATES.together, "fp32": two})]:
        monkeypatch.setattr(hardware, "has_bf16", lambda device, has_bf16=has_bf16: has_bf16)
        assert calibrate.measure(CPU).together == together


def test_rates_are_measured() -> None:
    found = rates.measure(CPU, seconds=0.0)
    assert all(0 <= found.unseen[precision][kind] < 1 for precision in rates.DTYPES for kind in ("gemm", "batched"))
    assert set(found.products) == set(found.together) == set(found.attention) == {"bf16", "fp32"}
    numbers = [found.moved, found.exponents, found.operations, found.updated, found.summed]
    assert all(0 < number < 1e15 for number in numbers)
    assert found.together["bf16"] == {"parts": 1.0, "parameter": 0.0}
    assert 1e-15 < found.product_seconds("fp32", 1.0, 1.0) < 1e-3


def test_the_memory_is_what_the_process_may_use() -> None:
    assert 2**28 < hardware.memory_bytes(CPU) < 2**50


def test_kernels_of_one_micro_batch_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def bounds(kernels: int, **given: str) -> list[str | None]:
        names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
        with monkeypatch.context() as patch:
            patch.setattr(hardware.os, "environ", dict(given))
            hardware.bound_kernel_caches(kernels)
            return [hardware.os.environ.get(name) for name in names]

    assert bounds(64) == ["64", "64"]
    assert bounds(300, LRU_CACHE_CAPACITY="9") == ["9", "300"]
    assert [hardware.kept_kernels(sizes, 10**8) for sizes in (0, 160, 200)] == [256, 256, 300]
    assert [hardware.kept_kernels(sizes, 10**9) for sizes in (0, 42, 200)] == [64, 64, 300]


def test_a_run_keeps_the_kernels_of_its_largest_micro_batch(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a" * n, "completion": "b"}) + "\n" for n in (1, 9, 30, 90)))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(hardware, "kept_kernels", lambda *numbers: asked.append(numbers) or 7)
    given = config.make(config.nested({"model": base.path, "data__train": str(rows), "precision": "fp32"}))
    prepared = prepare.prepare(given, Session())
    batch = forecast.largest(prepared.loader)[0]
    traced = trace(AutoConfig.from_pretrained(base.path), batch, nll, prepared.checked.machine, is_alone=True)
    assert asked == [(sum(traced.sizes.values()), traced.parameters)]
    assert asked[0][0] > 10
    assert prepared.kernels == 7
