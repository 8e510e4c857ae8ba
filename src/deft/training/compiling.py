"""Whether a run's layers are compiled, and for micro-batches of which sizes: settled before its first step.

Decided from the configuration, the plan and the device, never from a timing. It changes no result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

from torch.utils._triton import has_triton

from deft.core import hardware
from deft.core.types import Objective
from deft.dataset import cache
from deft.model import compiled_layers, quantized
from deft.model.causal_lm import CausalLM
from deft.plan.loader import Loader
from deft.training.state import TrainState
from deft.training.step import dry_run_step

LEAST_WORK = 1e17
"""FLOP of a run whose layers are worth compiling. Three buckets take about a minute, and a fifth of five minutes is won
at 350 TFLOP/s: published figures, not yet measured here."""


def begin(state: TrainState, planned: Loader, objective: Objective, say: Callable[[str], None]) -> None:
    """Compiles the model's layers where that is sound and worth it; nothing is compiled after it.

    One micro-batch of each size is computed and thrown away. Where that fails, layers stay as they are, and `say` is
    told why. Memory that does not suffice is raised.
    """
    if is_sound(state.causal_lm) and _work(state, planned) >= LEAST_WORK:
        compile_for(state, buckets(planned), objective, say)


def is_sound(causal_lm: CausalLM) -> bool:
    """Whether the layers of a model can be compiled: selective checkpointing and dropout have ways of their own."""
    model = causal_lm.model
    is_known = causal_lm.mode == "packed" and model.config.model_type in compiled_layers.FAMILIES
    is_plain = causal_lm.checkpointing != "selective" and not any(part.training for part in model.modules())
    is_plain = is_plain and not quantized.layers(model)
    return causal_lm.device.type == "cuda" and is_known and is_plain and has_triton()


def buckets(planned: Loader) -> tuple[int, ...]:
    """What micro-batches are filled up to. A document that is longer than all runs as it is."""
    sizes = [size for step in planned.spread_steps() for size in planned.sizes(step)]
    return compiled_layers.choose_buckets(sizes, largest=max(sizes))


def compile_for(
    state: TrainState,
    sizes: tuple[int, ...],
    objective: Objective,
    say: Callable[[str], None],
    backend: str | Callable[..., object] = "inductor",
) -> None:
    """Gives the model layers that are compiled for these buckets, or says why it has none."""
    began, causal_lm = time.perf_counter(), state.causal_lm
    compiled = compiled_layers.compiled(causal_lm.model, sizes, backend)
    try:
        for size in sizes:
            causal_lm.compiled = replace(compiled, buckets=(size,))
            dry_run_step(state, compiled_layers.smallest(), objective)
    except Exception as error:  # Whatever a compiler objects to, the run goes on without it.
        causal_lm.compiled = None
        if hardware.is_out_of_memory(error):
            raise
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).strip().partition("\n")[0]
        say(f"layers are not compiled, and steps take longer ({type(cause).__name__}: {reason})")
        return
    causal_lm.compiled = replace(compiled, is_warm=True)
    texts = ", ".join(f"{size:,}" for size in sizes)
    say(f"layers compiled for micro-batches of {texts} tokens in {time.perf_counter() - began:.0f} s")


def _work(state: TrainState, planned: Loader) -> float:
    """FLOP of the whole run, about."""
    steps = planned.spread_steps()
    tokens = sum(size for step in steps for size in planned.sizes(step)) * planned.steps / max(1, len(steps))
    return 6.0 * tokens * sum(parameter.numel() for parameter in state.causal_lm.model.parameters())


def keep_kernels() -> None:
    """What is compiled is kept with deft's cache, unless the user keeps it elsewhere: torch's own place is in /tmp.

    It holds for the whole process: for the command line alone.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # a second that other runs are spared

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == default_cache_dir():  # torch sets it when it is imported
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(cache.root() / "compiled" / folder))
