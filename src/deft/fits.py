"""What `forecast.fit` found, kept: a run that is started again is not traced again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from deft import hardware, rates, resume
from deft.dataset import cache
from deft.dataset.cache import Cache
from deft.dataset.store import Examples
from deft.forecast import Fit, Trace
from deft.hardware import Machine
from deft.loader import Loader

FILE = "fit.json"
COUNTED = ("products", "carried", "sizes")
"""Of a trace: what JSON has no keys for."""


def key(planned: Loader, examples: Examples, machine: Machine, *more: str) -> str:
    """The digest of all that a fit depends on: the examples and their plan, the machine, deft's code, and `more`."""
    orders = (array for epoch in planned.epochs for array in (epoch.order, epoch.starts))
    plan = [resume.plan_digest([*orders, examples.digests()]), planned.microbatch_tokens, planned.normalize]
    here = [rates.machine(machine.device), str(machine.device), str(machine.dtype)]
    memory = hardware.memory_bytes(machine.device)
    return cache.digest([plan, planned.limit, here, memory, cache.package(), more])


def kept(kept_in: Cache, key: str, planned: Loader, make: Callable[[], Fit]) -> Fit:
    """The fit of `planned` that was kept under `key`, or is made and kept now."""
    folder, _ = kept_in.get(key, lambda staging: staging.write_json(FILE, _as_json(make())))
    return _of_json(json.loads((folder / FILE).read_text(encoding="utf-8")), planned)


def _as_json(fit: Fit) -> Mapping[str, Any]:
    return {
        "microbatch_tokens": fit.planned.microbatch_tokens,
        "checkpointing": fit.checkpointing,
        "traced": fit.traced and _plain(fit.traced),
        "samples": [[_plain(trace), share] for trace, share in fit.samples],
    }


def _of_json(found: Mapping[str, Any], planned: Loader) -> Fit:
    return Fit(
        replace(planned, microbatch_tokens=found["microbatch_tokens"]),
        found["checkpointing"],
        found["traced"] and _trace(found["traced"]),
        tuple((_trace(trace), share) for trace, share in found["samples"]),
    )


def _plain(trace: Trace) -> Mapping[str, Any]:
    return {**asdict(trace), **{name: [*getattr(trace, name).items()] for name in COUNTED}}


def _trace(plain: Mapping[str, Any]) -> Trace:
    counted = {name: {tuple(what): count for what, count in plain[name]} for name in COUNTED}
    return Trace(**{**plain, **counted})
