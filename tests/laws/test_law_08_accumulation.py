"""Law 8: how a step is cut into micro-batches does not change the update (fp32, within 1e-6)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from states import state_around
from tiny_models import write_llama

from deft.dataset.build import encode
from deft.encoding.rows import Example
from deft.model import load as models
from deft.model import selftest
from deft.plan import loader
from deft.plan.order import Batching
from deft.training import chunked
from deft.training.masters import Masters
from deft.training.optim.adamw import AdamW
from deft.training.step import optimizer_step

ROWS = [
    {"prompt": "What is the capital of France? " * times, "completion": " ".join(["Paris."] * answer)}
    for times, answer in [(1, 1), (2, 9), (4, 2), (1, 20), (3, 3), (1, 7), (2, 2), (5, 1)]
]


def update(folder: str, examples: list[Example], microbatch_tokens: int, normalize: loader.Normalize) -> dict[str, Any]:
    """One AdamW step at deft's default rate: its loss, the gradients, and the weights after it.

    The difference of two *changes* would be larger: AdamW's first step gives entries whose gradient is but rounding
    noise a full-sized change.
    """
    model = models.load(models.inspect(folder), device="cpu", dtype=torch.float32)
    causal_lm = selftest.choose(model)
    state = state_around(causal_lm)
    planned = loader.make(
        examples, Batching(len(examples)), epochs=1, seed=0, microbatch_tokens=microbatch_tokens, normalize=normalize
    )
    work = planned.step(0)
    gradients: dict[str, torch.Tensor] = {}
    state.optimizer.step = _recording(state.optimizer, state.masters, gradients)  # type: ignore[method-assign]
    numbers = optimizer_step(state, work, chunked.NLL, clip=None, lr=1e-5)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"loss": numbers.loss, "gradients": gradients, "weights": weights, "batches": len(work.micro_batches)}


def _recording(optimizer: AdamW, masters: Masters, gradients: dict[str, torch.Tensor]) -> Any:
    plain = AdamW.step

    def step(lr: float, scale: torch.Tensor | None) -> None:
        gradients.update({name: masters.gradient(name).clone() for name in masters.parameters})
        plain(optimizer, lr, scale)

    return step


def assert_equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], within: float) -> None:
    """||a - b|| <= e ||b|| per tensor, with a floor of 1e-7 of the global norm."""
    floor = 1e-7 * float(torch.cat([tensor.flatten() for tensor in theirs.values()]).norm())
    for name, tensor in theirs.items():
        assert float((mine[name] - tensor).norm()) <= max(within * float(tensor.norm()), floor), name


@pytest.mark.parametrize("normalize", ["tokens", "examples"])
def test_the_cut_into_micro_batches_does_not_change_the_step(tmp_path: Path, normalize: loader.Normalize) -> None:
    folder = str(write_llama(tmp_path / "model"))
    examples = [(part,) for part in encode(ROWS, folder, max_length=128)]
    whole = update(folder, examples, 10**9, normalize)
    assert whole["batches"] == 1
    for budget in (1, 64, 150):
        cut = update(folder, examples, budget, normalize)
        assert cut["batches"] > 1
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert_equal(cut["gradients"], whole["gradients"], 1e-6)
        assert_equal(cut["weights"], whole["weights"], 1e-6)


def test_a_mean_of_means_would_be_seen(tmp_path: Path) -> None:
    """The negative control: normalizing each micro-batch by itself moves the gradients far beyond the tolerance."""
    folder = str(write_llama(tmp_path / "model"))
    examples = [(part,) for part in encode(ROWS, folder, max_length=128)]
    whole = update(folder, examples, 10**9, "tokens")
    means = update(folder, examples, 10**9, "examples")
    with pytest.raises(AssertionError):
        assert_equal(means["gradients"], whole["gradients"], 1e-2)


def test_a_real_model_on_real_rows(corpus: Path) -> None:
    import json

    folder = str(corpus / "models" / "stories260K")
    lines = (corpus / "data" / "gsm8k_train.jsonl").read_text().splitlines()[:16]
    examples = [(part,) for part in encode([json.loads(line) for line in lines], folder, max_length=512)]
    whole = update(folder, examples, 10**9, "tokens")
    for budget in (256, 1024):
        cut = update(folder, examples, budget, "tokens")
        assert cut["batches"] > 1
        assert_equal(cut["gradients"], whole["gradients"], 1e-6)
        assert_equal(cut["weights"], whole["weights"], 1e-6)


def test_a_step_in_which_nothing_is_learnt_is_not_taken(tmp_path: Path) -> None:
    folder = str(write_llama(tmp_path / "model"))
    model = models.load(models.inspect(folder), device="cpu", dtype=torch.float32)
    state = state_around(selftest.choose(model), torch.float32)
    examples = [(part,) for part in encode(ROWS, folder, max_length=128)]
    planned = loader.make(examples, Batching(4), epochs=1, seed=0, microbatch_tokens=10**9)
    assert optimizer_step(state, planned.step(0), chunked.NLL, clip=None, lr=1e-2).are_finite
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    work = planned.step(1)
    empty = (replace(b, rows=b.rows[:0], targets=b.targets[:0], weights=b.weights[:0]) for b in work.micro_batches)
    numbers = optimizer_step(
        state, replace(work, micro_batches=tuple(empty), normalizer=0.0), chunked.NLL, clip=None, lr=1e-5
    )
    assert not numbers.are_finite
    assert state.step == 1
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
