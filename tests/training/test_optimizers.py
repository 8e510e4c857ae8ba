"""Every update rule of training/optim/ keeps its contract; a new one is tested without touching this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import differences, folder, settings
from safetensors.torch import load_file
from tiny_training import dropout_model, planned
from torch import Tensor, nn

from deft.core import registry
from deft.core.errors import InputError
from deft.run import config
from deft.run.train import train
from deft.training import optim, optimizers
from deft.training.chunked import NLL, Chunked
from deft.training.config import OptimizerConfig
from deft.training.masters import Masters, compose
from deft.training.state import Optimizer, TrainState
from deft.training.step import optimizer_step

__all__ = ["folder"]
LR = 1e-2


SCHEDULE_FREE, EIGHT_BIT = "schedulefree:AdamWScheduleFree", "torchao.optim:AdamW8bit"
FOREIGN = ("torch.optim:NAdam", "torch.optim:RMSprop", "torch.optim:Adagrad", SCHEDULE_FREE, EIGHT_BIT)
"""Rules that keep tensors, numbers, state before their first step, numbers in their group, and quantised tensors."""


@pytest.fixture(params=[*registry.names(optim), *FOREIGN])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    found: str = request.param
    if registry.is_own(found):
        pytest.importorskip(found.partition(":")[0])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # half a minute of torchao's
    return found


@pytest.fixture
def make(name: str) -> Any:
    return lambda masters, **settings: optimizers.make(OptimizerConfig(name=name, **settings), masters)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def masters(request: pytest.FixtureRequest, name: str) -> Masters:
    """What has fewer than 4,096 elements, 8-bit rules leave in fp32."""
    return masters_of(request.param, 1024 if name == EIGHT_BIT else 6)


def masters_of(dtype: torch.dtype, width: int = 6) -> Masters:
    """A matrix, a bias, a norm, and a frozen matrix."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
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


def test_a_bad_step_changes_nothing(make: Any) -> None:
    causal_lm, batches = dropout_model(), planned()
    masters = Masters(causal_lm.model.named_parameters(), torch.float32)
    state = TrainState(causal_lm, masters, make(masters))
    optimizer_step(state, batches.step(0), NLL, lr=LR, clip=1.0)
    before = copies(state.optimizer.state() | masters.state())
    bad = Chunked(lambda logits_SV, targets_S: logits_SV.sum(1) * float("nan"))
    assert not optimizer_step(state, batches.step(1), bad, lr=LR, clip=1.0).are_finite
    assert_same(state.optimizer.state() | masters.state(), before)


def test_each_group_has_its_rate(make: Any) -> None:
    """A rule whose step follows the rate moves ten times as far; what is not named moves as it did."""
    plain, changed = masters_of(torch.float32), masters_of(torch.float32)
    start = {key: plain[key].clone() for key in plain}
    step(plain, make(plain), seed=1)
    step(changed, make(changed, rates={r"0\.weight": 10.0}), seed=1)
    assert torch.equal(plain["0.bias"], changed["0.bias"])
    moved, further = (float((each["0.weight"] - start["0.weight"]).norm()) for each in (plain, changed))
    assert further == pytest.approx(10 * moved, rel=1e-3)


def test_decay_is_of_matrices_alone(make: Any) -> None:
    plain, decayed = masters_of(torch.float32), masters_of(torch.float32)
    step(plain, make(plain, weight_decay=0.0), seed=1)
    step(decayed, make(decayed, weight_decay=0.5), seed=1)
    assert {key for key in plain if not torch.equal(plain[key], decayed[key])} == {"0.weight"}


def test_eight_bits_are_two_bytes_of_state_a_parameter() -> None:
    pytest.importorskip("torchao")
    masters = Masters([("weight", nn.Parameter(torch.zeros(256, 512)))], torch.float32)
    optimizer = optimizers.make(OptimizerConfig(name=EIGHT_BIT), masters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)
        step(masters, optimizer, seed=1)
    assert sum(each.nbytes for each in optimizer.state().values()) <= 2.2 * 256 * 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_schedule_free_rule_serves_is_its_average(dtype: torch.dtype) -> None:
    """As by the package alone; what is trained is then as it was, to the bit."""
    schedulefree = pytest.importorskip("schedulefree")
    ours, theirs = masters_of(dtype), masters_of(torch.float32)
    optimizer = optimizers.make(OptimizerConfig(name=SCHEDULE_FREE), ours)
    state = TrainState(dropout_model(), ours, optimizer)
    rule = schedulefree.AdamWScheduleFree([*theirs.parameters.values()], lr=LR, betas=(0.9, 0.95), foreach=False)
    rule.train()
    for seed in range(4):
        step(ours, optimizer, seed)
        put_gradients(theirs, seed)
        for parameter in theirs.parameters.values():
            parameter.grad = parameter.grad.to(dtype).float()  # type: ignore[union-attr]
        rule.step()
    trained = copies(ours.state())
    with state.as_served():
        rule.eval()
        assert all(torch.allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-7) for key in ours.parameters)
        assert not torch.allclose(ours["0.weight"], ours_master(trained, "0.weight"), rtol=1e-4)
    assert_same(ours.state(), trained)
    again = dict(optimizer.served())
    assert again.keys() == ours.parameters.keys()
    assert torch.allclose(again["0.weight"], theirs["0.weight"], rtol=1e-6, atol=1e-7)
    step(ours, optimizer, seed=5)


def test_a_run_evaluates_and_hands_over_the_average_and_resumes_what_it_trains(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("schedulefree")
    more = {"optimizer__name": SCHEDULE_FREE, "schedule__name": "constant", "epochs": 1, "precision": "fp32"}
    seen: list[dict[str, Tensor]] = []

    def loss(causal_lm: Any, *_: Any) -> float:
        seen.append(copies(dict(causal_lm.model.state_dict())))
        return 1.0

    monkeypatch.setattr("deft.evaluation.evaluate.held_out_loss", loss)
    for name in ("whole", "cut"):
        train(config.make(settings(folder, name, **more)))
    final = load_file(folder / "whole" / "final" / "model.safetensors")
    stored = load_file(folder / "whole" / "checkpoints" / "step-000005" / "model-00001.safetensors")
    assert all(torch.equal(seen[-1][key], each) for key, each in final.items())
    assert not any(torch.equal(stored[f"weight.{key}"], each) for key, each in final.items() if each.ndim == 2)
    for part in ("final", "checkpoints/step-000005"):
        (folder / "cut" / part).rename(folder / part.replace("/", "_"))
    train(config.make(settings(folder, "cut", **more)))
    assert differences(folder, "whole", "cut") == []


def ours_master(state: dict[str, Tensor], key: str) -> Tensor:
    return compose(state[f"weight.{key}"], state[f"low.{key}"]) if f"low.{key}" in state else state[f"weight.{key}"]


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
        saved[last] = torch.zeros(7) if damage == "shape" else saved[last].half()
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
        ({"name": "torch.optim:LBFGS"}, "computes the loss several times a step"),
    ],
)
def test_what_a_rule_does_not_have_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        optimizers.check(OptimizerConfig(**settings))
