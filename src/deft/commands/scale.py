"""`deft check --world N`: memory and time of a run's steps on each of N GPUs, by the formulas of run/scaling.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from deft.core import files
from deft.core.errors import InputError, MemoryShort
from deft.dataset.build import Dataset
from deft.model.load import skeleton
from deft.plan.loader import Loader
from deft.run import prepare, reading, scaling, spread
from deft.run.config import Config
from deft.run.reading import Session
from deft.run.scaling import Gpu, Load, Sizes, StepLayout, Way
from deft.tracking import console as display

GIB = 2**30
PARTS = {
    "weights": "weights",
    "low_bits": "low bits",
    "moments": "moments",
    "gradients": "gradients",
    "gathered": "gathered layers",
    "activations": "activations",
    "head": "head and loss",
}


@dataclass(frozen=True, slots=True)
class Scaled:
    """What `deft check --world` found.

    ways   one a shard
    own    the shard that the run's settings lead to on these GPUs
    shard  of the best one (`scaling.best`)
    least  the fewest GPUs that a copy fits on, spread over all of them; None where no number does
    """

    gpu: Gpu
    load: Load
    sizes: Sizes
    ways: tuple[Way, ...]
    own: int
    least: int | None

    @property
    def shard(self) -> int | None:
        found = scaling.best(self.ways)
        return None if found is None else found.layout.shard

    def as_json(self) -> dict[str, Any]:
        """Bytes and seconds; dtypes by name."""
        ways = []
        for way in self.ways:
            layout = {**asdict(way.layout), "dtype": str(way.layout.dtype)}
            memory = {**asdict(way.memory), "total": way.memory.total}
            seconds = {**asdict(way.seconds), "total": way.seconds.total, "bound": way.seconds.bound}
            sent = asdict(scaling.traffic(self.sizes, way.layout))
            ways.append({"layout": layout, "memory": memory, "traffic": sent, "seconds": seconds, "fits": way.fits})
        common = {name: asdict(getattr(self, name)) for name in ("gpu", "load", "sizes")}
        return {**common, "ways": ways, "own": self.own, "shard": self.shard, "least": self.least}


def run(
    config: Config, ranks: int, per_node: int, kind: str, report: str | None = None, console: Console | None = None
) -> Scaled:
    """Reads and encodes the rows, which say what a step holds; of the model its config alone. Needs no GPU.

    Raises InputError for a kind of GPU, ranks or a model of which nothing can be said, Problems as `deft check` does
    and where the run's `shard` does not divide the GPUs, and MemoryShort, after all is printed and written, where the
    run fits on these GPUs in no way.
    """
    gpu = scaling.gpu(kind)
    if ranks > per_node and ranks % per_node:
        fix = f"take {ranks // per_node * per_node} or {-(-ranks // per_node) * per_node}, or say --per-node"
        raise InputError(f"--world: {ranks} GPUs are not whole nodes of {per_node}; {fix}")
    own = spread.of(config, ranks, min(per_node, ranks))
    session = Session(console=console or display.of_run())
    checked = reading.check(config.model_copy(update={"device": "cpu"}), session, needs_weights=False)
    data = prepare.encode(config, checked, session)
    prepare.stop_unless_trainable(config, checked, data)
    load = _load(prepare.steps(config, checked, data), data)
    sizes = Sizes.of(*skeleton(checked.base, checked.trainable))
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    asked = config.microbatch_tokens if isinstance(config.microbatch_tokens, int) else None
    shards, is_ordered = {own, *scaling.shards(ranks, per_node)}, config.sums == "ordered"
    layouts = [StepLayout(ranks, per_node, each, 0, 0, dtype=dtype, is_ordered=is_ordered) for each in sorted(shards)]
    ways = tuple(scaling.way(sizes, load, gpu, layout, asked) for layout in layouts)
    found = Scaled(gpu, load, sizes, ways, own, scaling.least_ranks(sizes, load, gpu, layouts[0], asked))
    for line in _lines(config, found):
        session.say(line)
    session.console.print(table(found))
    if checked.objective.uses_start:
        session.say(f"note: {config.loss.name} keeps a copy of what is trained, which is not counted here")
    if report:
        files.write_json(Path(report), found.as_json())
    _conclude(found, session)
    return found


def _load(planned: Loader, data: Dataset) -> Load:
    """What steps hold, of those that stand for all."""
    members = [int(index) for step in planned.spread_steps() for index in planned.indices(step)]
    lengths = np.array([length for index in members for length in data.train.lengths(index)])
    return Load(
        tokens=float(lengths.sum() / len(planned.spread_steps())),
        longest=max(source.longest for source in data.ledgers),
        learnt=float(sum(map(data.train.targets, members)) / lengths.sum()),
        attended=float((lengths**2).sum() / lengths.sum()),
    )


def _lines(config: Config, found: Scaled) -> Iterator[str]:
    whole, load, gpu = found.sizes.whole, found.load, found.gpu
    trained = f"{whole.trained / 1e6:,.2f} M trained"
    frozen = f", {whole.frozen / 1e6:,.2f} M frozen" if whole.frozen else ""
    codes = f", {whole.codes / GIB:,.2f} GiB of codes" if whole.codes else ""
    yield f"model     {config.model}: {trained}{frozen}{codes}"
    rows = f"in rows of {load.attended:,.0f}, the longest {load.longest:,}"
    yield f"a step    {load.tokens:,.0f} tokens {rows}, {load.learnt:.0%} learnt"
    rate = f"{gpu.share:.0%} of {gpu.products / 1e12:,.0f} TFLOP/s"
    links = f"NVLink {gpu.nvlink / 1e9:,.0f}, InfiniBand {gpu.infiniband / 1e9:,.0f} GB/s"
    yield f"a GPU     {gpu.name}: {gpu.memory / GIB:,.1f} GiB, {scaling.SPARE:.0%} left free, {rate}, {links}"


def table(found: Scaled) -> Table:
    """A column for each shard, the run's own marked: GiB of a GPU, how its step is computed, and what that takes."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("GiB of each GPU")
    for way in found.ways:
        mark = "*" if way.layout.shard == found.own else ""
        made.add_column(f"{mark}shard={way.layout.shard}", justify="right")
    for name, text in {**PARTS, "total": "total"}.items():
        made.add_row(text, *(f"{getattr(way.memory, name) / GIB:,.2f}" for way in found.ways))
    made.add_row("fits", *("yes" if way.fits else "no" for way in found.ways))
    made.add_row("micro-batches", *(f"{way.layout.rounds} x {way.layout.tokens:,}" for way in found.ways))
    made.add_row("checkpointing", *(way.layout.mode for way in found.ways))
    for name in ("compute", "communication", "update", "total"):
        text = "a step" if name == "total" else name
        made.add_row(f"{text}, ms", *(f"{1000 * getattr(way.seconds, name):,.0f}" for way in found.ways))
    made.add_row("bound by", *(way.seconds.bound for way in found.ways))
    made.add_row("tokens/s", *(f"{found.load.tokens / way.seconds.total:,.0f}" for way in found.ways))
    return made


def _conclude(found: Scaled, session: Session) -> None:
    """What fits, and on how few GPUs. Raises MemoryShort where nothing does."""
    ranks = found.ways[0].layout.ranks
    if found.shard is not None:
        least = "1 GPU is" if found.least == 1 else f"{found.least} GPUs are"
        session.say(f"shard     {found.shard} is the fastest that fits; {least} the fewest for this run")
        own = next(way for way in found.ways if way.layout.shard == found.own)
        fix = "" if own.fits else f" and does not fit; set shard={found.shard}"
        session.say(f"*         shard={found.own} is what this run is set to{fix}")
        session.say("Formulas, no measurement: docs/scaling.md says how far off they are.")
        return
    need = min(way.memory.total for way in found.ways) / GIB
    short = (
        f"a step needs {need:,.1f} GiB on each of {ranks} {found.gpu.name}, which have {found.gpu.memory / GIB:,.1f}"
    )
    fix = "take a smaller max_length, or train an adapter (adapter=lora)"
    if found.least is not None and found.least > ranks:
        fix = f"--world {found.least} is the fewest that fit, with shard={found.least}; or {fix}"
    raise MemoryShort(f"out of memory: {short}; {fix}")
