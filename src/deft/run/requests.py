"""What a run is asked for and will not do, each as a finding: nothing that is asked for is passed over in silence."""

from __future__ import annotations

import math
from collections.abc import Iterator

from deft.dataset.build import Dataset
from deft.dataset.data_warnings import Finding
from deft.plan.config import ScheduleConfig
from deft.plan.loader import Loader
from deft.run.config import Config
from deft.run.reading import Checked


def unmet(config: Config, checked: Checked, data: Dataset, planned: Loader | None) -> Iterator[Finding]:
    """Settings without an effect on these rows and this plan."""
    yield from _evaluation(config, checked, data)
    if planned is not None:
        yield from _length(config, planned)
    for key, why in unused(config, is_chat=checked.is_chat).items():
        yield Finding("warning", f"{key} has no effect: {why}", "leave it out")


def _evaluation(config: Config, checked: Checked, data: Dataset) -> Iterator[Finding]:
    if config.data.eval and not data.held_out:
        rows = sum(source.rows for source in data.ledgers[: len(checked.train)])
        what = (
            f"data.eval={config.data.eval} holds out none of {rows} rows"
            if _is_share(config)
            else "no row of data.eval is left"
        )
        yield Finding(
            "warning", f"{what}: there is no held-out loss", "a larger share, or files of their own, give one"
        )
    if config.evaluate.every and not data.held_out and not checked.prompts:
        what = f"evaluate.every={config.evaluate.every}, and there is nothing to evaluate"
        yield Finding("warning", what, "set data.eval or evaluate.prompts")


def _is_share(config: Config) -> bool:
    return isinstance(config.data.eval, float)


def _length(config: Config, planned: Loader) -> Iterator[Finding]:
    if config.steps and planned.steps < config.steps:
        what = f"steps={config.steps}, and epochs={config.epochs} has {planned.steps}: the run ends there"
        epochs = math.ceil(config.steps * config.epochs / planned.steps)
        yield Finding("warning", what, f"epochs={epochs} has them all")
    if config.schedule.warmup > planned.steps:
        what = f"schedule.warmup={config.schedule.warmup:g} steps, and the run has {planned.steps}"
        yield Finding(
            "warning", f"{what}: the learning rate does not get to {config.optimizer.lr:g}", "warm up for less"
        )
    every, kept = config.checkpoint.every, config.checkpoint.keep_every
    if every and kept and math.lcm(every, kept) > planned.steps:
        what = f"checkpoint.keep_every={kept} keeps none of the steps that are saved, each {every}th"
        yield Finding("warning", what, "name a multiple of checkpoint.every")


def unused(config: Config, is_chat: bool) -> dict[str, str]:
    """Keys that are set and change nothing, and why.

    >>> from deft.run.config import load
    >>> unused(load(None, ["model=m", "data=a.jsonl", "schedule.decay=0.5"]), is_chat=True)
    {'schedule.decay': 'schedule.name is cosine, not wsd'}
    """
    found = {}
    if not is_chat:
        of_chats = [key for key in ("template", "reasoning") if getattr(config, key) != "auto"]
        of_chats += ["template_kwargs"] if config.template_kwargs else []
        found = dict.fromkeys(of_chats, "no row goes through a chat template (data.render=chat does that)")
    if config.truncation_side != "right" and config.overflow != "cut":
        found["truncation_side"] = f"overflow is {config.overflow}, not cut"
    if config.schedule.decay != ScheduleConfig().decay and config.schedule.name != "wsd":
        found["schedule.decay"] = f"schedule.name is {config.schedule.name}, not wsd"
    if not config.evaluate.prompts:
        asked = [key for key in ("generate", "stop_sequences") if getattr(config.evaluate, key)]
        found |= dict.fromkeys((f"evaluate.{key}" for key in asked), "there are no evaluate.prompts")
    return found
