"""What a run is asked for and will not do, each as a finding: nothing that is asked for is passed over in silence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from deft.core.types import Fate
from deft.dataset import ledger
from deft.dataset.build import Dataset
from deft.dataset.data_warnings import Finding
from deft.dataset.ledger import SourceLedger
from deft.plan.config import ScheduleConfig
from deft.plan.loader import Loader
from deft.run.config import Config
from deft.run.reading import Checked

LOST_SHARE = 0.05
"""From this share of rows on, what max_length takes away is a warning."""


def unmet(config: Config, checked: Checked, data: Dataset, planned: Loader | None) -> Iterator[Finding]:
    """Settings without an effect on these rows and this plan."""
    yield from _evaluation(config, checked, data)
    yield from _new_tokens(checked, data)
    yield from _too_long(checked, data.ledgers)
    yield from _averaged(config)
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


def _too_long(checked: Checked, ledgers: Sequence[SourceLedger]) -> Iterator[Finding]:
    """Rows that max_length took something from, or altogether."""
    rows, longest = sum(source.rows for source in ledgers), checked.policy.max_length
    is_longest = longest == checked.base.max_positions
    for fate, what in ((Fate.CUT, "cut"), (Fate.TOO_LONG, "left out")):
        lost = ledger.met(ledgers, fate)
        if lost:
            first = tuple(problem.where for problem in ledger.named(ledgers, fate)[: ledger.FIRST_ROWS])
            yield Finding(
                "warning" if lost >= LOST_SHARE * rows else "note",
                f"{what}, as longer than {longest} tokens: {lost} of {rows} rows",
                "choose another overflow" if is_longest else "raise max_length, or choose another overflow",
                first if len(first) == lost else (*first, "..."),
            )


def _averaged(config: Config) -> Iterator[Finding]:
    if config.optimizer.name.startswith("schedulefree:") and config.schedule.name != "constant":
        what = f"schedule.name is {config.schedule.name}, and {config.optimizer.name} averages weights in place of one"
        yield Finding("warning", what, "schedule=constant")


def _new_tokens(checked: Checked, data: Dataset) -> Iterator[Finding]:
    """How often they stand in the rows; one that stands in none is not learnt."""
    counts = (data.train + data.held_out).token_counts(checked.tokenizer.new_ids)
    found = {str(checked.tokenizer.hf.convert_ids_to_tokens(index)): count for index, count in counts.items()}
    if found:
        told = ", ".join(f"{token} {count:,}" for token, count in found.items())
        yield Finding("note", f"new tokens in the rows: {told}", "each is one token")
    if lacking := [token for token, count in found.items() if not count]:
        what = f"data.add_tokens: {', '.join(lacking)} stands in no row, and is not learnt"
        yield Finding("warning", what, "write it into the rows as it is, or leave it out")


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
