"""Learning rates, and AdamW with fp32 masters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from deft.optim.adamw import AdamW, round_into
from deft.schedule import factor, warmup_steps


@pytest.mark.parametrize(
    ("name", "theirs"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_without_warm_up_the_schedules_are_transformers_(name: str, theirs: object) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = theirs(optimizer, 0, 40)  # type: ignore[operator]
    for step in range(40):
        assert factor(name, step, 40) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_after_warm_up_the_cosine_is_halos_s_where_its_warm_up_is_whole(corpus: Path) -> None:
    compared = 0
    for case in json.loads((corpus / "golden" / "seeds.json").read_text())["halos_lr_schedule"]:
        total, share, peak = case["num_training_steps"], case["warmup"], case["peak_lr"]
        rising = warmup_steps(share, total)
        if share * total != rising:
            continue  # a fractional warm-up misses the peak in HALOs (its defect 9)
        for step in range(rising, total):
            assert factor("cosine", step, total, share) * peak == pytest.approx(case["lr_used_at_step"][step], rel=1e-9)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 0.1, 5])
def test_every_factor_is_above_0_and_at_most_1_and_reaches_1(name: str, warmup: float) -> None:
    factors = [factor(name, step, 50, warmup) for step in range(50)]  # type: ignore[arg-type]
    assert max(factors) == 1.0
    assert min(factors) > 0
    rising = warmup_steps(warmup, 50)
    assert factors[:rising] == sorted(factors[:rising])
    assert factors[rising] == 1.0


def test_wsd_is_flat_and_then_falls() -> None:
    factors = [factor("wsd", step, 10, 0, decay=0.4) for step in range(10)]
    assert factors == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype)


def optimizer(net: nn.Module, dtype: torch.dtype = torch.float32, **settings: float) -> AdamW:
    return AdamW(net.named_parameters(), dtype=dtype, lr=1e-2, **settings)  # type: ignore[arg-type]


def run(net: nn.Module, mine: AdamW, steps: int, splits: int = 1) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(8, 8).to(next(net.parameters()).dtype)
        for part in inputs.chunk(splits):
            (net(part).float().square().sum() / 8).backward()
            mine.collect()
        mine.clip(1.0)
        mine.step(1.0)


def test_fp32_is_torch_s_adamw() -> None:
    mine, theirs = model(), model()
    run(mine, optimizer(mine), 5)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    torch.manual_seed(1)
    for _ in range(5):
        (theirs(torch.randn(8, 8)).square().sum() / 8).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_masters_keep_what_bf16_would_lose() -> None:
    """At small rates an update is below half a unit of bf16: without masters nothing would ever move."""
    net = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    mine = AdamW(net.named_parameters(), dtype=torch.bfloat16, lr=1e-5)
    before = net.weight.detach().clone()
    for _ in range(400):
        net.weight.grad = torch.ones_like(net.weight)
        mine.collect()
        mine.step(1.0)
    moved = mine.masters["weight"].detach() - before.float()
    assert torch.allclose(moved, torch.full_like(moved, -4e-3), atol=3e-4)
    assert (net.weight != before).any()
    copy = torch.empty_like(net.weight)
    round_into(mine.masters["weight"], copy)
    assert torch.equal(copy, net.weight)


def test_a_model_saved_in_fp32_keeps_its_bits_under_bf16_compute() -> None:
    net = model()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    mine = optimizer(net, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in net.parameters())
    for name, master in mine.masters.items():
        assert torch.equal(master, before[name])


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    mine = AdamW(net.named_parameters(), dtype=torch.bfloat16, lr=1e-5)
    for value in (256.0, 1.0, 1.0):
        net.weight.grad = torch.full_like(net.weight, value)
        mine.collect()
    assert float(mine.clip(None)) == 258.0, "bf16 cannot hold 257"


def test_clipping_returns_the_norm_before_it_and_scales_to_the_limit() -> None:
    net = nn.Linear(2, 2)
    mine = optimizer(net)
    net.weight.grad, net.bias.grad = torch.full((2, 2), 3.0), torch.full((2,), 4.0)
    assert float(mine.clip(1.0)) == pytest.approx((4 * 9 + 2 * 16) ** 0.5)
    assert float(mine.clip(None)) == pytest.approx(1.0, abs=1e-5)


def test_weight_decay_spares_biases_and_norms() -> None:
    net = model()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    mine = optimizer(net, weight_decay=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    mine.step(1.0)
    for name, parameter in net.named_parameters():
        expected = before[name] * (1 - 1e-2 * 0.5) if parameter.ndim == 2 else before[name]
        assert torch.allclose(parameter, expected)


def test_frozen_parameters_are_neither_trained_nor_mastered() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    mine = optimizer(net, torch.bfloat16)
    assert "0.weight" not in mine.masters
    assert net[0].weight.dtype == torch.bfloat16
