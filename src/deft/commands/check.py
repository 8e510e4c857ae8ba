"""`deft check`: everything but training: what a run would learn and do, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deft.core import files, hardware
from deft.core.types import Fate
from deft.dataset import ledger
from deft.dataset.build import Dataset
from deft.dataset.data_warnings import Finding
from deft.dataset.ledger import SourceLedger
from deft.dataset.survey import not_read
from deft.distributed.world import World
from deft.encoding.tokenizer import Tokenizer
from deft.model.load import ModelSummary, summarise
from deft.plan import summary
from deft.plan.summary import PlanSummary
from deft.run import plan_time, prepare, reading, requests
from deft.run.build import load
from deft.run.config import Config
from deft.run.forecast import Fit, Forecast, forecast
from deft.run.plan_time import PlanTime
from deft.run.reading import Checked, Session
from deft.training import compiling

BAR = 24
"""Width of the longest bar of a histogram."""
PIPED_WIDTH = 140
"""Cells of a line where there is no terminal."""


@dataclass(frozen=True, slots=True)
class Checkup:
    """What `deft check` found.

    plan      None where no row is left to plan with
    expected  None there, and where the architecture has to be seen running
    time      None unless it is asked for
    """

    ledgers: tuple[SourceLedger, ...]
    model: ModelSummary
    plan: PlanSummary | None
    expected: Forecast | None
    findings: tuple[Finding, ...]
    time: PlanTime | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "sources": [source.as_json() for source in self.ledgers],
            "model": asdict(self.model),
            "plan": None if self.plan is None else asdict(self.plan),
            "expected": None if self.expected is None else asdict(self.expected),
            "findings": [asdict(finding) for finding in self.findings],
            "time": None if self.time is None else asdict(self.time),
        }


def run(
    config: Config, report: str | None = None, console: Console | None = None, *, is_timed: bool = False
) -> Checkup:
    """Prints what is found, writes it to `report` (JSON) if that is named; makes no output folder.

    Weights are loaded only if `is_timed`: micro-batches of the plan are then run, and all its steps priced by them.

    Raises DeftError, with exit code 2, for whatever would keep the run from starting: first all that needs no row's
    tokens, in one error, then, after everything is printed, what became of the rows. MemoryShort where micro-batches
    that are timed do not fit.
    """
    session = Session(console=console or _console())
    has_weights = any(Path(config.model).expanduser().glob("*.safetensors"))
    checked = reading.check(config, session, needs_weights=is_timed or has_weights)
    data = prepare.encode(config, checked, session)
    fit = prepare.plan(config, checked, data, session) if data.train else None
    found = Checkup(
        ledgers=data.ledgers,
        model=summarise(checked.base, checked.trainable),
        plan=_summary(fit, data) if fit else None,
        expected=forecast(fit, checked.machine) if fit else None,
        findings=tuple(_findings(config, checked, data, fit)),
    )
    _print(session, config, checked, found)
    _write(report, found)
    prepare.stop_unless_trainable(config, checked, data)
    if fit and is_timed:
        found = replace(found, time=_measured(config, checked, fit, session))
        session.say(f"time      {found.time}")
        _write(report, found)
    else:
        session.say("time      deft check --time measures it: it loads the model and runs a few micro-batches")
    session.say("Nothing keeps this run from starting.")
    return found


def _measured(config: Config, checked: Checked, fit: Fit, session: Session) -> PlanTime:
    """Loads the model as the command line does for a run and times micro-batches of the plan.

    Raises MemoryShort where they do not fit.
    """
    session.say(f"loading {config.model} to time a few micro-batches of it")
    fix = "a smaller microbatch_tokens or max_length needs less memory"
    with hardware.within_memory(lambda: f"micro-batches of {fit.planned.microbatch_tokens} tokens; {fix}"):
        state = load(config, checked, fit, World(), owns_process=True)  # as the command line does for a run
        session.say(state.causal_lm.note)
        compiling.begin(state, fit.planned, checked.objective, session.say)
        return plan_time.measure(state, fit.planned, checked.objective, config.optimizer.clip)


def _write(report: str | None, found: Checkup) -> None:
    if report:
        files.write_json(Path(report), found.as_json())


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)


def _summary(fit: Fit, data: Dataset) -> PlanSummary:
    plan, examples = fit.planned, data.train
    return summary.summarise(plan.epochs, plan.steps, examples.lengths, examples.targets, plan.microbatch_tokens)


def _findings(config: Config, checked: Checked, data: Dataset, fit: Fit | None) -> Iterator[Finding]:
    """What a user should know, the gravest kinds first: rows, requests, tokens that stop the model, the folder."""
    yield from ledger.findings(data.ledgers)
    yield from requests.unmet(config, checked, data, fit.planned if fit else None)
    if config.data.train_on == "all" and checked.is_chat:
        what = "data.train_on is all: what users and tools say is learnt as well"
        yield Finding("note", what, "leave data.train_on out to learn what the assistant says")
    for note in checked.base.notes:
        yield Finding("warning", note, "name the model with its own config.json where that is not meant")
    if warning := checked.tokenizer.warning:
        yield Finding("warning", warning, "whoever serves the model with transformers gets its ids as well")
    yield from stop_findings(checked.tokenizer, checked.base.stop_ids, data.marks)
    folder = Path(checked.base.path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        yield Finding("warning", f"{folder} has no weights", "deft train needs its *.safetensors files")


def stop_findings(tokenizer: Tokenizer, stop_ids: Sequence[int], marks: frozenset[str]) -> Iterator[Finding]:
    """Where tokenizer, generation_config and chat template disagree on what ends an answer.

    stop_ids  those of generation_config
    marks     what ended the learnt turns of chats
    """
    eos, eos_id = tokenizer.hf.eos_token, tokenizer.eos_id
    stops = ", ".join(str(tokenizer.hf.convert_ids_to_tokens(index)) for index in stop_ids)
    if eos_id is None:
        fix = "set eos_token in its tokenizer_config.json"
        yield Finding("warning", "the tokenizer has no EOS token, so strings without roles are not closed", fix)
    elif stop_ids and eos_id not in stop_ids:
        what = f"the tokenizer's EOS {eos!r} is not among the stop tokens of generation_config ({stops})"
        yield Finding("warning", what, "see which of them the model was trained with; final/ will name all of them")
    for mark in sorted(marks):
        mark_id = tokenizer.special_tokens.get(mark)
        if mark_id is None:
            what = f"the chat template ends turns with {mark!r}, which is no token of this tokenizer"
            yield Finding("warning", what, "name another with template=, or stop at this text when serving")
        elif mark_id != eos_id and mark_id not in stop_ids:
            what = f"the chat template ends turns with {mark!r}, which is not yet a stop token of the model"
            yield Finding("note", what, "final/generation_config.json will name it")
    if eos_id is not None and tokenizer.hf.pad_token_id == eos_id:
        what = f"padding and EOS are the same token {eos!r}"
        yield Finding("note", what, "harmless: deft pads nothing, and takes no mask from a token's id")


def _print(session: Session, config: Config, checked: Checked, found: Checkup) -> None:
    session.console.print(_table(found.ledgers))
    for line in chain(not_read(checked.train + checked.held_out), *map(_source_lines, found.ledgers)):
        session.say(line)
    session.say("")
    for text in checked.texts():
        session.say(f"template  {text}")
    for line in [*_model_lines(config, checked, found), *_plan_lines(found.plan), ""]:
        session.say(line)
    for finding in found.findings:
        style = "yellow" if finding.level == "warning" else ""
        session.console.print(str(finding), style=style, highlight=False, soft_wrap=True, markup=False)


def _table(ledgers: Sequence[SourceLedger]) -> Table:
    """A line per source; fates of no row are left out."""
    fates = [fate for fate in Fate if any(source.fates[fate.value] for source in ledgers)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("source", "shape"):
        table.add_column(name, overflow="fold")
    for name in ("rows", *(fate.value.replace("_", " ") for fate in fates), "examples", "tokens", "learnt", "share"):
        table.add_column(name, justify="right")
    for source in ledgers:
        counts = [source.rows, *(source.fates[fate.value] for fate in fates), source.examples, source.tokens]
        numbers = [f"{number:,}" for number in (*counts, source.target_tokens)]
        table.add_row(source.source, source.shape, *numbers, f"{source.target_share:.1%}")
    return table


def _source_lines(source: SourceLedger) -> Iterator[str]:
    if not source.lengths:
        return
    yield f"\n{source.source}: tokens of a text"
    most = max(count for _, count in source.lengths)
    for tokens, count in source.lengths:
        yield f"  {tokens:>13}  {'█' * -(-BAR * count // most):{BAR}}  {count:,}"
    yield "  longest: " + ", ".join(f"{row} ({tokens:,})" for row, tokens in source.longest_rows)


def _model_lines(config: Config, checked: Checked, found: Checkup) -> Iterator[str]:
    base, machine, model = checked.base, checked.machine, found.model
    of_which = "" if model.trained == model.parameters else f" of which {model.trained / 1e6:,.2f} M are trained,"
    limit = f"{base.max_positions:,} positions" if base.max_positions else "no limit of positions"
    size = f"{model.parameters / 1e6:,.2f} M parameters,{of_which}"
    yield f"model     {config.model}: {base.model_type}, {size} {base.dtype}, {limit}, vocabulary {base.vocab_size:,}"
    codes = f"{model.quantized / 1e6:,.2f} M in {config.quantize}, {model.quantized_bytes / 2**20:,.1f} MiB of codes"
    base_in = f"; {codes}" if model.quantized else ""
    yield f"computes  in {machine.dtype_name} on {machine.device}; masters are fp32{base_in}"
    yield f"expected  {found.expected or 'the memory of this model shows in the run only'}"
    against = model.against_packing
    packing = f"one document at a time, as {against}" if against else "by all the config says"
    yield f"packing   {packing}; the self-test of the loaded model decides before the first step"


def _plan_lines(plan: PlanSummary | None) -> Iterator[str]:
    if plan is None:
        yield "plan      no row is left to train on"
        return
    epochs = f"{plan.epochs} epochs of {plan.steps_per_epoch} steps over {plan.examples:,} examples"
    yield f"plan      {plan.steps:,} steps: {epochs}"
    yield (
        f"a step    {plan.examples_per_step} examples, {plan.tokens_per_step} tokens, {plan.targets_per_step} learnt, "
        f"in {plan.packs_per_step} micro-batches ({plan.fill:.0%} full)"
    )
