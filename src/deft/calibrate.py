"""What the parts of a training step do not tell of the whole: a small model's steps, foretold from this machine's rates
and then taken.

Parts are measured one by one, again and again; in a step each finds the others' data in the cache. What that costs
differs from machine to machine. It serves predictions only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from deft import forecast, hardware, loader, rates
from deft.errors import DiskError
from deft.hardware import Machine
from deft.loss import nll
from deft.model import selftest
from deft.model.causal_lm import CausalLM
from deft.optim.adamw import AdamW
from deft.rates import Rates
from deft.training.masters import Masters, clip_scale
from deft.types import MicroBatch

MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "tie_word_embeddings": True,
}
LENGTHS = ((70, 110, 130, 150, 190, 210, 230, 270, 310, 330), (40, 50))
"""Tokens of the documents of a large micro-batch and of a small one, the second half of them learnt."""
STEPS, WARMUP = (4, 8), 2
"""Of each. The first ones make kernels, and find no memory that the process has had before."""


def kept(device: torch.device, say: Callable[[str], None]) -> Rates:
    """What was measured earlier, or now, which takes its time; then it is kept, if it can be."""
    found = rates.saved(device)
    if found is None:
        say("measuring how fast this machine is, once: about 20 seconds")
        found = measure(device)
        with suppress(DiskError):
            rates.keep(found, device)
    return found


def measure(device: torch.device, seconds: float = 0.1) -> Rates:
    """`rates.measure`, and on CPUs what steps take beyond these: a factor, and seconds per parameter.

    Elsewhere layers are compiled while a run goes on, which these steps would not show. In bf16 only where that is
    fast: where it is emulated, these steps would take minutes.
    """
    found = rates.measure(device, seconds)
    if device.type != "cpu":
        return found
    precisions = ("fp32", "bf16") if hardware.has_bf16(device) else ("fp32",)
    return replace(found, together={**found.together, **{name: _together(found, name, device) for name in precisions}})


@dataclass(frozen=True, slots=True)
class _Step:
    """Of one micro-batch: the sum of its parts by a machine's rates, and the seconds that it took."""

    parts: float
    seconds: float


def _together(found: Rates, precision: str, device: torch.device) -> dict[str, float]:
    """What turns the parts of steps into their seconds."""
    dtype, config = rates.DTYPES[precision], AutoConfig.for_model("llama", **MODEL)
    causal_lm, masters, optimizer = _model(config, dtype)
    steps = []
    for lengths, count in zip(LENGTHS, STEPS, strict=True):
        batch, times = _batch(lengths), []
        traced = forecast.trace(config, batch, nll.objective, Machine(device, dtype, sum(lengths)), is_alone=True)
        for _ in range(count):
            start = time.perf_counter()
            _step(causal_lm, masters, optimizer, batch)
            times.append(time.perf_counter() - start)
        parts = traced.seconds(found) + traced.parameters / found.updated
        steps.append(_Step(parts, median(times[WARMUP:])))
    large, small = steps
    return _split(large, small, traced.parameters)


def _split(large: _Step, small: _Step, parameters: int) -> dict[str, float]:
    """The factor of the parts and the seconds per parameter by which both took their time; a factor alone where there
    are none.

    >>> _split(_Step(4.0, 5.0), _Step(0.5, 1.5), 1000)
    {'parts': 1.0, 'parameter': 0.001}
    >>> _split(_Step(4.0, 5.0), _Step(0.5, 0.5), 1000)
    {'parts': 1.25, 'parameter': 0.0}
    """
    factor = (large.seconds - small.seconds) / (large.parts - small.parts)
    besides = large.seconds - factor * large.parts
    if factor < 0.0 or besides < 0.0:
        factor, besides = large.seconds / large.parts, 0.0
    return {"parts": factor, "parameter": besides / parameters}


def _batch(lengths: Sequence[int]) -> MicroBatch:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(MODEL["vocab_size"], size=length) for length in lengths]
    return loader.build([(each, (np.arange(len(each)) >= len(each) // 2).astype(np.float32)) for each in tokens])


def _model(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[CausalLM, Masters, AdamW]:
    """Random weights; what else draws random numbers goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    causal_lm, masters = selftest.choose(model.train()), Masters(model.named_parameters(), dtype)
    return causal_lm, masters, AdamW(masters)


def _step(causal_lm: CausalLM, masters: Masters, optimizer: AdamW, batch: MicroBatch) -> None:
    masters.collect()
    causal_lm(batch, nll.objective).nll_sum.backward()
    optimizer.step(1e-6, clip_scale(masters.squared_norm().sqrt(), 1.0))
