"""Every update rule of training/optim/ keeps its contract; a new one is tested without touching this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deft.core import registry
from deft.core.errors import InputError
from deft.training import optim, optimizers
from deft.training.config import OptimizerConfig
from deft.training.masters import Masters
from deft.training.state import Optimizer

LR = 1e-2


FOREIGN = ("torch.optim:NAdam", "torch.optim:RMSprop", "torch.optim:Adagrad")
"""Rules that keep tensors, numbers, and state before their first step."""


@pytest.fixture(params=[*registry.names(optim), *FOREIGN])
def make(request: pytest.FixtureRequest) -> Any:
    return lambda masters: optimizers.make(OptimizerConfig(name=request.param), masters)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def masters(request: pytest.FixtureRequest) -> Masters:
    return masters_of(request.param)


def masters_of(dtype: torch.dtype) -> Masters:
    """A matrix, a bias, a norm, and a frozen matrix."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    net[2].weight.requires_grad_(False)
    return Masters(net.named_parameters(), dtype)


def put_gradients(masters: Masters, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in masters.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


def step(masters: Masters, optimizer: Optimizer, seed: int, scale: Tensor | None = None) -> None:
    put_gradients(masters, seed)
    optimizer.step(LR, scale)


def copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_one_step_moves_every_trained_master_and_drops_the_gradients(make: Any, masters: Masters) -> None:
    before = {name: masters[name].clone() for name in masters}
    step(masters, make(masters), seed=1)
    moved = {name for name in masters if not torch.equal(masters[name], before[name])}
    assert moved == set(masters.parameters) == set(masters) - {"2.weight"}
    assert all(masters.gradient(name) is None for name in masters.parameters)


def test_a_master_without_a_gradient_stays(make: Any, masters: Masters) -> None:
    optimizer = make(masters)
    put_gradients(masters, seed=1)
    masters.parameters["0.weight"].grad = None
    before = masters["0.weight"].clone()
    optimizer.step(LR)
    assert torch.equal(masters["0.weight"], before)


def test_gradients_are_multiplied_by_the_scale(make: Any) -> None:
    scaled, plain = masters_of(torch.float32), masters_of(torch.float32)
    step(scaled, make(scaled), seed=1, scale=torch.tensor(0.25))
    optimizer = make(plain)
    put_gradients(plain, seed=1)
    for parameter in plain.parameters.values():
        parameter.grad *= 0.25
    optimizer.step(LR)
    assert_same(scaled.state(), plain.state())


def test_its_state_is_restored_to_the_bit(make: Any, masters: Masters) -> None:
    """As live tensors: the steps after it are those that followed the first time."""
    optimizer = make(masters)
    step(masters, optimizer, seed=1)
    saved, weights = copies(optimizer.state()), copies(masters.state())
    step(masters, optimizer, seed=2)
    expected = copies(optimizer.state() | masters.state())
    step(masters, optimizer, seed=3)

    again = make(masters)
    masters.restore(weights)
    again.restore(saved)
    assert_same(again.state(), saved)
    step(masters, again, seed=2)
    assert_same(again.state() | masters.state(), expected)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "dtype"])
def test_what_does_not_fit_changes_nothing(make: Any, masters: Masters, damage: str) -> None:
    optimizer = make(masters)
    step(masters, optimizer, seed=1)
    saved = copies(optimizer.state())
    step(masters, optimizer, seed=2)
    before = copies(optimizer.state())
    last = [*saved][-1]
    if damage == "missing":
        del saved[last]
    elif damage == "unknown":
        saved["unknown"] = torch.zeros(1)
    else:
        saved[last] = torch.zeros(7) if damage == "shape" else saved[last].double()
    with pytest.raises(ValueError, match=r"unknown" if damage == "unknown" else last):
        optimizer.restore(saved)
    assert_same(optimizer.state(), before)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("sgd", lambda each: torch.optim.SGD(each, momentum=0.9)),
        ("adafactor", torch.optim.Adafactor),
        ("adamw", lambda each: torch.optim.AdamW(each, betas=(0.9, 0.95), weight_decay=0.0)),
        ("torch.optim:NAdam", lambda each: torch.optim.NAdam(each, betas=(0.9, 0.95))),
    ],
)
def test_in_fp32_it_is_what_torch_does(name: str, rule: Any) -> None:
    ours, theirs = masters_of(torch.float32), masters_of(torch.float32)
    optimizer, torchs = optimizers.make(OptimizerConfig(name=name), ours), rule([*theirs.parameters.values()])
    torchs.param_groups[0]["lr"] = LR
    for seed in range(5):
        step(ours, optimizer, seed)
        put_gradients(theirs, seed)
        torchs.step()
        torchs.zero_grad()
    for parameter in ours.parameters:
        assert torch.allclose(ours[parameter], theirs[parameter], rtol=1e-6, atol=1e-8)


def test_lion_is_its_algorithm() -> None:
    masters = masters_of(torch.float32)
    optimizer = optimizers.make(OptimizerConfig(name="lion", betas=(0.9, 0.99), weight_decay=0.1), masters)
    w, m = masters["0.weight"].clone(), torch.zeros(5, 6)
    for seed in range(3):
        put_gradients(masters, seed)
        g = masters.parameters["0.weight"].grad
        assert g is not None
        w = w - LR * ((0.9 * m + 0.1 * g).sign() + 0.1 * w)
        m = 0.99 * m + 0.01 * g
        optimizer.step(LR)
    assert torch.allclose(masters["0.weight"], w, rtol=1e-5)


def test_muon_takes_matrices_of_layers_alone() -> None:
    net = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 3), "proj": nn.Linear(3, 3)})
    masters = Masters(net.named_parameters(), torch.float32)
    optimizer = optimizers.make(OptimizerConfig(name="muon"), masters)
    step(masters, optimizer, seed=1)
    assert set(optimizer.state()) == {
        "begun",
        "momentum_buffer.proj.weight",
        *(
            f"{key}.{name}"
            for name in ("embed_tokens.weight", "proj.bias")
            for key in ("exp_avg", "exp_avg_sq", "step")
        ),
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"name": "sgd", "betas": (0.5, 0.5)}, r"optimizer.betas: sgd has no such setting; it has .*momentum"),
        ({"name": "lion", "options": {"momentum": 1}}, r"lion has no option momentum; it has betas"),
        ({"name": "adamw", "options": {"betas": (0.1, 0.2)}}, r"say optimizer.betas"),
        ({"name": "torch.optim:Nonsense"}, "Nonsense"),
    ],
)
def test_what_a_rule_does_not_have_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        optimizers.check(OptimizerConfig(**settings))
