"""Law 7: each fast loss equals the reference; zero weight, zero gradient; linear in the weights.

The default objective and a user's own function are held to it. What every file in loss/ must be is in
tests/training/test_objectives.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import reference_loss as reference
import torch
from torch import Tensor
from torch.nn import functional

import deft.training.loss
from deft.core import registry
from deft.core.errors import InputError
from deft.core.types import Head, Objective, Tally
from deft.training import chunked, objectives
from deft.training.objectives import OwnObjective

NAMES = registry.names(deft.training.loss)


@dataclass(frozen=True)
class Sums:
    """An objective as functions that give its sum; its weight is compared on the way."""

    objective: Objective

    def loss(self, hidden_KH: Tensor, head: Head, targets_K: Tensor, weights_K: Tensor) -> Tensor:
        return self._sum(self.objective(hidden_KH, head, targets_K, weights_K), weights_K)

    def loss_from_logits(self, logits_KV: Tensor, targets_K: Tensor, weights_K: Tensor) -> Tensor:
        return self._sum(self.objective.from_logits(logits_KV, targets_K, weights_K), weights_K)

    def _sum(self, tally: Tally, weights_K: Tensor) -> Tensor:
        assert not tally.weight_sum.requires_grad
        assert float(tally.weight_sum) == pytest.approx(float(weights_K.double().sum()), rel=1e-12)
        return tally.nll_sum


LOSSES: dict[str, Any] = {
    "nll": Sums(objectives.load("nll")),
    "reference": reference,
    "a user's own": Sums(OwnObjective("reference_loss:loss_from_logits", reference.loss_from_logits)),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "scale": 1.5, "softcap": 4.0},
}
Case = tuple[Tensor, Head, Tensor, Tensor]


@pytest.fixture(params=LOSSES)
def room(request: pytest.FixtureRequest) -> Any:
    return LOSSES[request.param]


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 rows, slices of 1, gradients of 5 rows of the weight at a time."""
    monkeypatch.setattr(chunked, "LEAST_ROWS", 4)
    monkeypatch.setattr(chunked, "round_up_rows", lambda rows: -(-rows // 4) * 4)
    monkeypatch.setattr(chunked, "CPU_BLOCK", 1)
    monkeypatch.setattr(chunked, "CPU_PIECE", 5)
    monkeypatch.setattr(chunked, "NARROWED", 7)
    monkeypatch.setattr(chunked, "CPU_SLICE", 1)


def make_case(
    targets: int = 127,
    hidden: int = 33,
    vocabulary: int = 251,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Case:
    rng = torch.Generator().manual_seed(targets + vocabulary)
    hidden_KH = torch.randn(targets, hidden, generator=rng, dtype=torch.float64)
    weight_VH = torch.randn(vocabulary, hidden, generator=rng, dtype=torch.float64) / 3
    bias_V = torch.randn(vocabulary, generator=rng, dtype=torch.float64) if bias else None
    weights_K = torch.rand(targets, generator=rng, dtype=torch.float64).float()
    targets_K = torch.randint(vocabulary, (targets,), generator=rng)
    head = Head(weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype), scale, softcap)
    return hidden_KH.to(dtype), head, targets_K, weights_K


def leaves_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, Head]:
    hidden_KH, head, _, _ = case
    weight, bias = head.weight, head.bias
    return hidden_KH.detach().to(dtype).requires_grad_(), replace(
        head,
        weight=weight.detach().to(dtype).requires_grad_(),
        bias=None if bias is None else bias.detach().to(dtype).requires_grad_(),
    )


def run(room: Any, case: Case, dtype: torch.dtype, grad_output: float = 1.0) -> list[Tensor]:
    """[loss, d_hidden, d_weight, d_bias if there is one], from the case's values cast to dtype."""
    hidden_KH, head = leaves_of(case, dtype)
    loss = room.loss(hidden_KH, head, case[2], case[3])
    (loss * grad_output).backward()
    leaves = [leaf for leaf in (hidden_KH, head.weight, head.bias) if leaf is not None]
    assert all(leaf.grad is not None and leaf.grad.dtype == dtype for leaf in leaves)
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def run_like_hugging_face(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """As its models write it: head, scale and softcap in dtype, cross entropy in fp32."""
    hidden_KH, head = leaves_of(case, dtype)
    logits_KV = functional.linear(hidden_KH, head.weight, head.bias) * head.scale
    if head.softcap is not None:
        logits_KV = torch.tanh(logits_KV / head.softcap) * head.softcap
    loss = (functional.cross_entropy(logits_KV.float(), case[2], reduction="none") * case[3]).sum()
    loss.backward()
    leaves = [leaf for leaf in (hidden_KH, head.weight, head.bias) if leaf is not None]
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def relative_errors(ours: list[Tensor], oracle: list[Tensor]) -> list[float]:
    assert len(ours) == len(oracle)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, oracle, strict=True)]


def test_the_folder_holds_the_default_and_not_the_reference() -> None:
    assert "nll" in NAMES
    with pytest.raises(InputError, match=r"loss\.name: 'reference' is not there; there is "):
        objectives.load("reference")


def test_the_reference_is_a_weighted_sum_of_cross_entropies() -> None:
    logits_KV = torch.tensor([[0.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    targets_K = torch.tensor([0, 1])
    weights_K = torch.tensor([2.0, 0.5])
    expected = 2.0 * math.log(2) + 0.5 * math.log1p(math.exp(-3))
    assert float(reference.loss_from_logits(logits_KV, targets_K, weights_K)) == pytest.approx(
        float(expected), rel=1e-7
    )


@pytest.mark.parametrize("head", HEADS)
def test_in_fp64_it_is_the_reference(room: Any, head: str) -> None:
    case = make_case(**HEADS[head])
    ours = run(room, case, torch.float64, grad_output=0.7)
    assert max(relative_errors(ours, run(reference, case, torch.float64, grad_output=0.7))) < 1e-13


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.usefixtures("tiny_blocks")
def test_chunks_change_nothing(room: Any, head: str) -> None:
    case = make_case(targets=7, **HEADS[head])
    assert max(relative_errors(run(room, case, torch.float64), run(reference, case, torch.float64))) < 1e-13


@pytest.mark.parametrize("rows", [255, 256, 257, 512, 513])
def test_rows_on_a_chunk_boundary_count_once(room: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_BLOCK", 1)
    case = make_case(targets=rows, vocabulary=19)
    assert max(relative_errors(run(room, case, torch.float64), run(reference, case, torch.float64))) < 1e-13


def test_rows_that_fill_up_a_block_add_nothing_even_where_tokens_are_impossible(room: Any) -> None:
    case = make_case(targets=17, vocabulary=19, bias=True)
    assert case[1].bias is not None
    impossible = sorted(set(range(19)) - set(case[2].tolist()))
    case[2][case[2] == 0] = 1
    case[1].bias[[0, *impossible]] = -math.inf
    ours, oracle = run(room, case, torch.float64), run(reference, case, torch.float64)
    assert math.isfinite(ours[0])
    assert max(relative_errors(ours, oracle)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("vocabulary", [127, 251])
def test_low_precision_costs_no_more_than_hugging_face(
    room: Any, head: str, vocabulary: int, dtype: torch.dtype
) -> None:
    case = make_case(targets=300, vocabulary=vocabulary, dtype=dtype, **HEADS[head])
    oracle = run(reference, case, torch.float64)
    theirs = relative_errors(run_like_hugging_face(case, dtype), oracle)
    ours = relative_errors(run(room, case, dtype), oracle)
    assert all(our <= 1.1 * their + 2 * torch.finfo(torch.float32).eps for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("blocks", range(2, chunked.NARROW_BLOCKS + 1))
def test_a_few_blocks_need_no_sum_in_fp32(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_blocks", lambda rows, *_: chunked._slices(rows, rows // blocks))
    case = make_case(targets=blocks * 512, vocabulary=251, dtype=torch.bfloat16)
    oracle = run(reference, case, torch.float64)
    narrowed, sums = chunked._narrowed, []
    monkeypatch.setattr(chunked, "_narrowed", lambda total, dtype: sums.append(total.dtype) or narrowed(total, dtype))
    narrow = relative_errors(run(chunked, case, torch.bfloat16), oracle)
    monkeypatch.setattr(chunked, "NARROW_BLOCKS", 0)
    wide = relative_errors(run(chunked, case, torch.bfloat16), oracle)
    assert sums == [torch.bfloat16, torch.float32]
    assert narrow[2] <= 1.05 * wide[2]


@pytest.mark.usefixtures("tiny_blocks")
def test_the_gradient_of_many_blocks_is_summed_in_fp32() -> None:
    """Over 150 blocks the rounding of a bf16 sum would be five times as large."""
    case = make_case(targets=1200, vocabulary=19, dtype=torch.bfloat16)
    oracle = run(reference, case, torch.float64)
    theirs = relative_errors(run_like_hugging_face(case, torch.bfloat16), oracle)
    ours = relative_errors(run(chunked, case, torch.bfloat16), oracle)
    assert ours[2] <= 1.5 * theirs[2]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.usefixtures("tiny_blocks")
def test_accuracy_and_entropy_come_with_the_loss(head: str, is_trained: bool) -> None:
    case = make_case(targets=37, vocabulary=19, **HEADS[head])
    hidden_KH, own = leaves_of(case, torch.float64)
    logits_KV = own.scale * functional.linear(hidden_KH, own.weight, own.bias)
    if own.softcap is not None:
        logits_KV = own.softcap * torch.tanh(logits_KV / own.softcap)
    targets_K, weights_K = case[2], case[3]
    targets_K[::2] = logits_KV.argmax(1)[::2]
    hits = (weights_K * (logits_KV.argmax(1) == targets_K)).double().sum()
    entropy = (weights_K * torch.distributions.Categorical(logits=logits_KV).entropy()).sum()
    assert 0 < hits < weights_K.sum()
    with torch.set_grad_enabled(is_trained):
        loss, found_hits, found_entropy = chunked.loss_and_statistics(hidden_KH, own, targets_K, weights_K)
        assert torch.equal(loss, chunked.loss(hidden_KH, own, targets_K, weights_K))
    assert loss.requires_grad == is_trained
    assert not found_hits.requires_grad
    assert not found_entropy.requires_grad
    assert float(found_hits) == pytest.approx(float(hits), rel=1e-12)
    assert float(found_entropy) == pytest.approx(float(entropy.detach()), rel=1e-12)


def test_zero_weight_gives_zero_gradient(room: Any) -> None:
    hidden_KH, head, targets_K, weights_K = make_case(**HEADS["all"])
    weights_K[::3] = 0.0
    gradient_KH = run(room, (hidden_KH, head, targets_K, weights_K), torch.float32)[1]
    assert not gradient_KH[::3].any()
    assert gradient_KH[1::3].any(dim=1).all()

    ours = run(room, (hidden_KH, head, targets_K, weights_K * 0), torch.float32)
    assert not any(tensor.any() for tensor in ours)


def test_it_is_linear_in_the_weights(room: Any) -> None:
    hidden_KH, head, targets_K, weights_K = make_case(**HEADS["all"])
    one, other = weights_K.double(), weights_K.flip(0).double()
    parts = [run(room, (hidden_KH, head, targets_K, w), torch.float64) for w in (one, other)]
    whole = run(room, (hidden_KH, head, targets_K, 2 * one + 3 * other), torch.float64)
    expected = [2 * a + 3 * b for a, b in zip(*parts, strict=True)]
    assert max(relative_errors(whole, expected)) < 1e-13


def test_no_targets_give_zero_with_gradients_attached(room: Any) -> None:
    loss, *gradients = run(room, make_case(targets=0, **HEADS["all"]), torch.float32)
    assert loss == 0
    assert [tuple(g.shape) for g in gradients] == [(0, 33), (251, 33), (251,)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_unmoved(room: Any, frozen: str) -> None:
    case = make_case(**HEADS["all"])
    expected = dict(zip(("hidden", "weight", "bias"), run(room, case, torch.float64)[1:], strict=True))
    hidden_KH, head = leaves_of(case, torch.float64)
    leaves = {"hidden": hidden_KH, "weight": head.weight, "bias": head.bias}
    leaves[frozen].requires_grad_(False)
    room.loss(hidden_KH, head, case[2], case[3]).backward()
    assert leaves.pop(frozen).grad is None
    assert all(torch.equal(leaf.grad, expected[name]) for name, leaf in leaves.items())


def test_a_frozen_head_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_KH, head, targets_K, weights_K = make_case()
    sums: list[tuple[int, ...]] = []
    monkeypatch.setattr(chunked, "_add_product", lambda total, *_, is_first: sums.append(tuple(total.shape)))
    chunked.loss(hidden_KH.requires_grad_(), head, targets_K, weights_K).backward()
    assert sums == []
    chunked.loss(hidden_KH, replace(head, weight=head.weight.requires_grad_()), targets_K, weights_K).backward()
    assert sums == [(251, 33)]


def test_without_gradients_only_the_value_is_computed(room: Any) -> None:
    case = make_case()
    hidden_KH, head = leaves_of(case, torch.float64)
    with torch.no_grad():
        loss = room.loss(hidden_KH, head, case[2], case[3])
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(run(room, case, torch.float64)[0]), rel=1e-14)


def test_tied_weights_add_up(room: Any) -> None:
    _, head, targets_K, weights_K = make_case()
    inputs_K = targets_K.roll(1)

    def gradient_of(module: Any) -> Tensor:
        weight = head.weight.clone().requires_grad_()
        module.loss(functional.embedding(inputs_K, weight), Head(weight), targets_K, weights_K).backward()
        assert weight.grad is not None
        return weight.grad

    assert max(relative_errors([gradient_of(room)], [gradient_of(reference)])) < 1e-13


@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_a_second_backward_is_refused_not_wrong(factor: float) -> None:
    case = make_case(dtype=torch.bfloat16)
    hidden_KH, head = leaves_of(case, torch.bfloat16)
    loss = chunked.loss(hidden_KH, head, case[2], case[3])
    torch.autograd.grad(factor * loss, [hidden_KH, head.weight], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(factor * loss, [hidden_KH, head.weight])


def test_hidden_states_may_differ_in_dtype_from_the_weight(room: Any) -> None:
    case = make_case(dtype=torch.bfloat16, **HEADS["all"])
    hidden_KH, head = leaves_of(case, torch.float32)
    room.loss(hidden_KH.bfloat16(), head, case[2], case[3]).backward()
    gradients = [hidden_KH.grad, head.weight.grad, head.bias.grad]
    assert {g.dtype for g in gradients} == {torch.float32}
    in_bf16 = run(room, case, torch.bfloat16)[1:]
    assert max(relative_errors(gradients, [g.double() for g in in_bf16])) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("tiny_blocks")
def test_from_logits_it_is_the_reference_and_leaves_them_alone(room: Any, dtype: torch.dtype) -> None:
    hidden_KH, head, targets_K, weights_K = make_case(targets=7)
    logits_KV = (hidden_KH @ head.weight.T).to(dtype).requires_grad_()
    before = logits_KV.detach().clone()
    loss = room.loss_from_logits(logits_KV, targets_K, weights_K)
    (gradient,) = torch.autograd.grad(0.7 * loss, [logits_KV])

    oracle_KV = before.double().requires_grad_()
    oracle = reference.loss_from_logits(oracle_KV, targets_K, weights_K)
    (expected,) = torch.autograd.grad(0.7 * oracle, [oracle_KV])
    assert torch.equal(logits_KV, before)
    assert gradient.dtype == dtype
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: torch.finfo(torch.bfloat16).eps}[dtype]
    assert relative_errors([loss.detach()], [oracle.detach()])[0] < min(tolerance, 1e-6)
    assert relative_errors([gradient], [expected])[0] < tolerance


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_stay_finite(room: Any, shift: float) -> None:
    logits_KV = torch.tensor([[shift, 0.0, shift]]).requires_grad_()
    loss = room.loss_from_logits(logits_KV, torch.tensor([0]), torch.ones(1))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits_KV.grad).all()
