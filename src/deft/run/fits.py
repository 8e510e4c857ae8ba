"""What `forecast.fit` found, kept: a run that is started again is not traced again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace

from deft.core import hardware
from deft.core.hardware import Machine
from deft.dataset import cache
from deft.dataset.cache import Cache
from deft.dataset.store import Examples
from deft.plan.loader import Loader
from deft.run import resume
from deft.run.forecast import Fit, Trace

FILE = "fit.json"


def key(planned: Loader, examples: Examples, machine: Machine, *more: str) -> str:
    """The digest of all that a fit depends on: the examples and their plan, the machine, deft's code, and `more`."""
    orders = (array for epoch in planned.epochs for array in (epoch.order, epoch.starts))
    plan = [resume.plan_digest([*orders, examples.digests()]), planned.microbatch_tokens, planned.normalize]
    here = [hardware.describe(machine.device), str(machine.dtype), hardware.memory_bytes(machine.device)]
    return cache.digest([plan, planned.limit, here, cache.package(), more])


def kept(kept_in: Cache, key: str, planned: Loader, make: Callable[[], Fit]) -> Fit:
    """The fit of `planned` that was kept under `key`, or is made and kept now."""
    folder, _ = kept_in.get(key, lambda staging: staging.write_json(FILE, _as_json(make())))
    tokens, mode, traced = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return Fit(replace(planned, microbatch_tokens=tokens), mode, traced and Trace(**traced))


def _as_json(fit: Fit) -> list[object]:
    return [fit.planned.microbatch_tokens, fit.checkpointing, fit.traced and asdict(fit.traced)]
