"""A run whose layers are compiled: the same numbers, for buckets of its plan, or as before where that cannot be."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_llama import state_of
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import write_llama
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from deft.core.types import Encoded, Origin
from deft.plan import loader
from deft.plan.order import Batching
from deft.run import config
from deft.run.reading import Session
from deft.run.train import train as run_config
from deft.training import chunked, compiling

ROWS = [{"prompt": f"What is {'1 + ' * (n % 5)} {n}?", "completion": f" It is {n + n % 5}."} for n in range(24)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(folder: Path, model: Path, **settings: Any) -> tuple[Path, list[dict[str, Any]], str]:
    """The run folder, its metrics, and what was said."""
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "model": str(model),
        "data": {"train": str(folder / "train.jsonl"), "eval": 0.2},
        "output": str(folder / "run"),
        "batch": {"examples": 8},
        "microbatch_tokens": 160,
        "epochs": 2,
        "precision": "fp32",
        "evaluate": {"every": 2, "prompts": ["What is 1?"], "generate": {"max_new_tokens": 4}},
        **settings,
    }
    console = Console(file=io.StringIO(), width=300)
    run_config(config.make(values), Session(console=console))
    metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return folder / "run", [json.loads(line) for line in metrics], console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a GPU with a compiler."""
    monkeypatch.setattr(compiling, "is_sound", lambda causal_lm: True)
    monkeypatch.setattr(compiling, "LEAST_WORK", 0.0)
    monkeypatch.setattr(compiling, "compile_for", partial(compiling.compile_for, backend="aot_eager"))


def test_a_run_with_compiled_layers_learns_the_same(tmp_path: Path, worth_it: None, monkeypatch: Any) -> None:
    model = write_llama(tmp_path / "model")
    graphs = list[int]()
    train_steps = compiling.dry_run_step

    def counting(*arguments: Any) -> None:
        train_steps(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(compiling, "dry_run_step", counting)
    ours, metrics, said = run(tmp_path / "compiled", model)
    assert "layers compiled for micro-batches of " in said
    assert counters["stats"]["unique_graphs"] == graphs[-1] > 0
    monkeypatch.setattr(compiling, "is_sound", lambda causal_lm: False)
    theirs, plain, unsaid = run(tmp_path / "plain", model)
    assert "compiled" not in unsaid.replace(str(tmp_path), "")
    assert sum(line["padded_tokens"] for line in metrics) > 2 * sum(line["padded_tokens"] for line in plain) > 0
    assert [line["loss"] for line in metrics] == pytest.approx([line["loss"] for line in plain], rel=1e-5)
    same = load_file(theirs / "final" / "model.safetensors")
    for name, weight in load_file(ours / "final" / "model.safetensors").items():
        assert (weight - same[name]).norm() <= 1e-5 * same[name].norm(), name


def test_the_time_to_the_first_step_is_told_once(tmp_path: Path) -> None:
    _, _, said = run(tmp_path / "run", write_llama(tmp_path / "model"))
    assert said.count("first step after ") == said.count(" s of it loading the model)") == 1


def test_where_no_compiler_works_a_run_goes_on_without(
    tmp_path: Path, worth_it: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = compiling.compile_for.func  # type: ignore[attr-defined]

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C compiler here\nand more")

    monkeypatch.setattr(compiling, "compile_for", partial(own, backend=broken))
    model = write_llama(tmp_path / "model")
    _, metrics, said = run(tmp_path / "run", model)
    assert said.count("layers are not compiled, and steps take longer (") == 1
    assert "no C compiler here" in said
    assert len(metrics) > 4
    monkeypatch.setattr(compiling, "is_sound", lambda causal_lm: False)
    _, plain, _ = run(tmp_path / "plain", model)
    assert [line["padded_tokens"] for line in metrics] == [line["padded_tokens"] for line in plain]


def test_memory_that_does_not_suffice_is_no_reason_to_go_on() -> None:
    def greedy(graph: Any, inputs: Any) -> Any:
        def kernels(*arguments: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return kernels

    state = state_of()
    with pytest.raises(torch.OutOfMemoryError):
        compiling.compile_for(state, (64,), chunked.NLL, print, greedy)
    assert state.causal_lm.compiled is None


@pytest.mark.parametrize("is_torch_s", [False, True])
def test_kernels_are_kept_with_deft_s_cache_or_where_the_user_says(
    cache: Path, is_torch_s: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    if is_torch_s:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    compiling.keep_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "compiled" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_nothing_is_compiled_on_a_cpu_or_for_a_short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    state, said = state_of(), list[str]()
    assert not compiling.is_sound(state.causal_lm)
    monkeypatch.setattr(compiling, "is_sound", lambda causal_lm: True)
    compiling.begin(state, planned([50] * 40), chunked.NLL, said.append)
    assert state.causal_lm.compiled is None
    assert not said


def planned(lengths: list[int], tokens: int = 4096) -> loader.Loader:
    examples = [
        (Encoded(Origin("a", n), np.arange(length, dtype=np.int32), np.ones(length, np.float32)),)
        for n, length in enumerate(lengths)
    ]
    return loader.make(examples, Batching(examples=8), epochs=2, seed=0, microbatch_tokens=tokens)


def test_buckets_take_every_micro_batch_that_was_looked_at() -> None:
    lengths = np.random.default_rng(0).integers(2, 600, 400).tolist()
    for tokens in (1024, 4096):
        plan = planned(lengths, tokens)
        buckets = compiling.buckets(plan)
        batches = [batch for work in plan.step_batches() for batch in work.micro_batches]
        assert [size for step in range(plan.steps) for size in plan.sizes(step)] == [len(b.tokens) for b in batches]
        assert len(buckets) <= 3
        assert max(len(batch.tokens) for batch in batches) <= buckets[-1]
        filling = sum(
            min(bucket for bucket in buckets if bucket >= len(batch.tokens)) - len(batch.tokens) for batch in batches
        )
        assert filling < 0.6 * sum(buckets[-1] - len(batch.tokens) for batch in batches)
