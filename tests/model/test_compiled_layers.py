"""Law 6 for what fills micro-batches up to one size, and layers that are compiled for a few sizes once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_llama import micro_batches, model, state_of
from torch._dynamo.utils import counters

from deft.core.types import MicroBatch
from deft.model import compiled_layers, fused_layers
from deft.model.causal_lm import CausalLM
from deft.model.checkpointing import Checkpointing
from deft.model.compiled_layers import pad
from deft.training import chunked, compiling
from deft.training.state import TrainState

BUCKETS = (32, 64, 72)


def gradients(causal_lm: CausalLM, batch: MicroBatch) -> dict[str, torch.Tensor]:
    causal_lm.model.zero_grad()
    total = causal_lm(batch, chunked.NLL).nll_sum
    total.backward()
    found = {
        name: weight.grad.clone() for name, weight in causal_lm.model.named_parameters() if weight.grad is not None
    }
    return {"loss": total.detach(), **found}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], share: float) -> None:
    whole = torch.stack([each.norm() for each in theirs.values()]).norm()
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= share * theirs[name].norm() + 1e-7 * whole, name


@pytest.mark.parametrize("has_blocks", [False, True])
def test_what_fills_up_changes_neither_sums_nor_gradients(has_blocks: bool) -> None:
    own = model()
    if has_blocks:
        assert fused_layers.install(own) == 2
    causal_lm = CausalLM(own, "packed")
    for batch in micro_batches():
        filled = pad(batch, 800)
        assert len(filled.tokens) == sum(filled.documents) == 800
        assert filled.positions.tolist() == [place for length in filled.documents for place in range(length)]
        assert_equal(gradients(causal_lm, filled), gradients(causal_lm, batch), 1e-6)


@pytest.fixture
def compiler() -> Any:
    """A compiler that traces and differentiates as the real one does, and counts what it is given."""
    torch._dynamo.reset()
    counters.clear()
    yield "aot_eager"
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_layers_are_compiled_before_the_first_step_and_never_again(
    compiler: str, checkpointing: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_compiled_once(state_of("llama_tied", checkpointing), compiler, monkeypatch)


@pytest.mark.parametrize("name", sorted(compiled_layers.FAMILIES - {"gemma3_text"} | {"gemma3"} - {"llama"}))
def test_layers_of_each_family_are_compiled_once(name: str, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(name)
    assert state.causal_lm.model.config.model_type in compiled_layers.FAMILIES
    check_compiled_once(state, compiler, monkeypatch)


def check_compiled_once(state: TrainState, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, said = micro_batches(), list[str]()
    plain = state.causal_lm
    expected = [gradients(plain, batch) for batch in batches]
    plain.model.zero_grad()
    compiling.compile_for(state, BUCKETS, chunked.NLL, said.append, compiler)
    assert said[0].startswith("layers compiled for micro-batches of 32, 64, 72 tokens in ")
    assert state.causal_lm.compiled is not None
    assert all(weight.grad is None for weight in plain.model.parameters())
    graphs, calls = counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]
    assert graphs > 0
    eager = list[str]()
    count_calls(state.causal_lm.model, eager, monkeypatch)
    for batch, theirs in zip(batches, expected, strict=True):
        assert_equal(gradients(state.causal_lm, batch), theirs, 1e-5)
    assert (counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]) == (graphs, calls)
    assert not eager, "a micro-batch went past the compiled layers"
    assert not any("forward" in layer.__dict__ for layer in state.causal_lm.compiled.forwards)


def count_calls(model: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes the MLPs that run as they are: what is compiled is never called again."""
    for kind in {type(layer.mlp) for layer in model.base_model.layers}:
        own = kind.forward

        def forward(self: Any, *arguments: Any, own: Callable[..., Any] = own) -> Any:
            if not torch.compiler.is_compiling():
                calls.append(type(self).__name__)
            return own(self, *arguments)

        monkeypatch.setattr(kind, "forward", forward)
