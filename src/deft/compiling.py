"""Whether a run's layers are compiled, and for micro-batches of which sizes: settled before its first step.

Decided from the configuration, the plan and the device, never from a timing. It changes no result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

from torch.utils._triton import has_triton

from deft import hardware
from deft.dataset import cache
from deft.loader import Loader
from deft.model import static
from deft.model.learner import Learner
from deft.training.rehearse import rehearse
from deft.training.state import TrainState

LEAST_WORK = 1e17
"""FLOP of a run whose layers are worth compiling. Three rooms take about a minute, and a fifth of five minutes is won
at 350 TFLOP/s: published figures, not yet measured here."""


def begin(state: TrainState, planned: Loader, loss: ModuleType, say: Callable[[str], None]) -> None:
    """Compiles the learner's layers where that is sound and worth it; nothing is compiled after it.

    One micro-batch of each size is computed and thrown away. Where that fails, layers stay as they are, and `say` is
    told why. Memory that does not suffice is raised.
    """
    if is_sound(state.learner) and _work(state, planned) >= LEAST_WORK:
        compile_for(state, rooms(planned), loss, say)


def is_sound(learner: Learner) -> bool:
    """Whether the layers of a learner can be compiled: selective checkpointing and dropout have ways of their own."""
    model = learner.model
    is_known = learner.mode == "packed" and model.config.model_type in static.FAMILIES
    is_plain = learner.checkpointing != "selective" and not model.training
    return learner.device.type == "cuda" and is_known and is_plain and has_triton()


def rooms(planned: Loader) -> tuple[int, ...]:
    """What micro-batches are filled up to. A document that is longer than all runs as it is."""
    sizes = [size for step in planned.spread_steps() for size in planned.sizes(step)]
    return static.choose_rooms(sizes, largest=max(sizes))


def compile_for(
    state: TrainState,
    sizes: tuple[int, ...],
    loss: ModuleType,
    say: Callable[[str], None],
    backend: str | Callable[..., object] = "inductor",
) -> None:
    """Gives the learner layers that are compiled for these rooms, or says why it has none."""
    began, learner = time.perf_counter(), state.learner
    _keep_kernels()
    compiled = static.compiled(learner.model, sizes, backend)
    try:
        for room in sizes:
            state.learner = replace(learner, compiled=replace(compiled, rooms=(room,)))
            rehearse(state, static.smallest(), loss)
    except Exception as error:  # Whatever a compiler objects to, the run goes on without it.
        state.learner = learner
        if hardware.is_out_of_memory(error):
            raise
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).strip().partition("\n")[0]
        say(f"layers are not compiled, and steps take longer ({type(cause).__name__}: {reason})")
        return
    state.learner = replace(learner, compiled=replace(compiled, is_warm=True))
    texts = ", ".join(f"{room:,}" for room in sizes)
    say(f"layers compiled for micro-batches of {texts} tokens in {time.perf_counter() - began:.0f} s")


def _work(state: TrainState, planned: Loader) -> float:
    """FLOP of the whole run, about."""
    steps = planned.spread_steps()
    tokens = sum(size for step in steps for size in planned.sizes(step)) * planned.steps / max(1, len(steps))
    return 6.0 * tokens * sum(parameter.numel() for parameter in state.learner.model.parameters())


def _keep_kernels() -> None:
    """What is compiled is kept with deft's cache, unless the user keeps it elsewhere: torch's own place is in /tmp."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # a second that other runs are spared

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == default_cache_dir():  # torch sets it when it is imported
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(cache.root() / "compiled" / folder))
