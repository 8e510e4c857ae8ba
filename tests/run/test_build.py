"""One way from a loaded model to the state of a run: names, frozen parameters, other update rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_llama import micro_batches, model
from states import state_around
from tiny_models import write_llama
from torch import Tensor
from transformers import PreTrainedModel

from deft.core.hardware import Machine
from deft.core.types import StepBatch
from deft.distributed.world import World
from deft.model import load as models
from deft.model.causal_lm import CausalLM
from deft.run import config
from deft.run.build import build, pretrained
from deft.training import chunked
from deft.training.masters import Masters, copy_state
from deft.training.state import TrainState
from deft.training.step import optimizer_step

BF16 = Machine(torch.device("cpu"), torch.bfloat16, 4096)


def step_batch() -> StepBatch:
    batches = tuple(micro_batches())
    return StepBatch(0, 0, batches, float(sum(len(batch.targets) for batch in batches)), 1, 1, ((),) * len(batches))


def built(folder: Path, frozen: str = "", machine: Machine = BF16) -> TrainState:
    """The state around a model of fp32 weights, some of them frozen."""
    base = models.inspect(str(write_llama(folder)))

    def make() -> PreTrainedModel:
        model = pretrained(base, machine)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and frozen in name))
        return model

    made = config.make({"model": base.path, "data": {"train": "rows.jsonl"}})
    return build(made, make, machine, World())


@pytest.mark.parametrize("frozen", ["layers.0", "layers.1", "norm", "embed"])
def test_a_partly_frozen_model_of_fp32_weights_trains_in_bf16(tmp_path: Path, frozen: str) -> None:
    state = built(tmp_path / "model", frozen)
    before = {name: master.clone() for name, master in state.masters.items()}
    numbers = optimizer_step(state, step_batch(), chunked.NLL, lr=1e-3, clip=1.0)
    assert numbers.are_finite
    assert {parameter.dtype for parameter in state.causal_lm.model.parameters()} == {torch.bfloat16}
    same = {name for name, master in state.masters.items() if torch.equal(master, before[name])}
    assert same == {name for name in before if frozen in name}


def test_names_are_those_of_the_hugging_face_model(tmp_path: Path) -> None:
    state = built(tmp_path / "model")
    names = [name for name, _ in state.causal_lm.model.named_parameters()]
    tensors = state.tensors()
    assert [key for key in tensors["model"] if key.startswith("weight.")] == [f"weight.{name}" for name in names]
    assert {f"low.{name}" for name in names} < tensors["optimizer"].keys()
    assert list(state.masters) == names


def test_what_making_a_model_draws_depends_on_the_seed() -> None:
    def draw(seed: int) -> float:
        made = config.make({"model": "unused", "data": {"train": "rows.jsonl"}, "seed": seed})
        drawn: list[float] = []

        def make() -> Any:
            drawn.append(torch.rand(()).item())
            return model()

        build(made, make, Machine(torch.device("cpu"), torch.float32, 64), World())
        return drawn[0]

    assert draw(1) == draw(1) != draw(2)


class Momentum:
    """Another update rule: heavy-ball momentum, one tensor of state a parameter."""

    def __init__(self, masters: Masters) -> None:
        self._masters = masters
        self._velocity = {name: torch.zeros_like(masters[name]) for name in masters.parameters}

    @torch.no_grad()
    def step(self, lr: float, scale: Tensor | None = None) -> None:
        for name, velocity in self._velocity.items():
            for master_B, gradient_B, velocity_B in self._masters.updates(name, velocity, scale=scale):
                master_B.sub_(velocity_B.mul_(0.9).add_(gradient_B), alpha=lr)

    def state(self) -> dict[str, Tensor]:
        return {f"velocity.{name}": each for name, each in self._velocity.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        copy_state(self.state(), state)


def momentum_state(dtype: torch.dtype) -> TrainState:
    state = state_around(CausalLM(model(), "packed"), dtype)
    state.optimizer = Momentum(state.masters)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_update_rule_steps_on_masters_and_resumes_to_the_same_bits(dtype: torch.dtype) -> None:
    state = momentum_state(dtype)
    reference = {name: torch.nn.Parameter(master.clone()) for name, master in state.masters.items()}
    rule = torch.optim.SGD(reference.values(), lr=1e-2, momentum=0.9)
    for step in range(4):
        if step == 2:
            tensors = state.tensors()
            state = momentum_state(dtype)
            state.restore(tensors, step)
        for batch in micro_batches():
            state.masters.collect()
            state.causal_lm(batch, chunked.NLL).nll_sum.backward()
        for name, each in reference.items():
            each.grad = state.masters.gradient(name).float().clone()  # type: ignore[union-attr]
        rule.step()
        state.optimizer.step(1e-2)
        assert all(torch.equal(state.masters[name], each.detach()) for name, each in reference.items())
