"""Rows that are understood -> a plan: tokens, steps, memory, and what an earlier start has done. No weights yet."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from deft.core import hardware, registry, versions
from deft.core.errors import InputError
from deft.core.redact import redacted_json
from deft.dataset import build, cache, ledger, refusals
from deft.dataset.build import Dataset
from deft.dataset.cache import Cache
from deft.dataset.row_digests import RowDigests
from deft.dataset.survey import not_read
from deft.model import load as models
from deft.plan import loader
from deft.plan.loader import Loader
from deft.plan.order import Batching
from deft.run import forecast, reading, requests, resume, spread, ways_out
from deft.run.build import whole_in
from deft.run.config import Config
from deft.run.finished import RunRequest
from deft.run.forecast import Fit, Forecast, Share
from deft.run.reading import Checked, Session
from deft.run.resume import NEW_RUN, EarlierStarts, Inputs
from deft.tracking import console as display
from deft.training import resuming
from deft.training.checkpoint import Checkpoint
from deft.training.state import TrainState


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the model's weights are loaded.

    config     resolved
    fit        the plan, with micro-batches that fit in memory
    expected   None where the architecture has to be seen running
    batchings  what cuts steps, and from which step on
    """

    config: Config
    checked: Checked
    share: Share
    data: Dataset
    fit: Fit
    expected: Forecast | None
    rows: RowDigests
    inputs: Inputs
    batchings: tuple[tuple[int, Batching], ...]
    earlier: EarlierStarts

    def inputs_until(self, step: int) -> Inputs:
        """What the first `step` steps are trained on."""
        return replace(self.inputs, plan=resume.plan_digest(self.fit.planned.until(step)))

    def request(self) -> RunRequest:
        """What is asked for, for who asks again when it is done."""
        config, checked = self.config, self.checked
        sources = checked.train + checked.held_out
        is_by_files = all(survey.content and not registry.is_own(source.format) for source, survey in sources)
        rows = (self.rows.digest, RowDigests.of(self.data.held_out).digest)
        digests = {
            "rows": "" if is_by_files else resume.plan_digest(rows),
            "prompts": resume.digest(*map(str, checked.prompts)) if checked.prompts else "",
            "loss.name": _own_file(config.loss.name) if registry.is_own(config.loss.name) else "",
        }
        return RunRequest(self.inputs, checked.files(), digests)

    def checkpoint(self, state: TrainState, is_evaluated: bool, loss: float | None = None) -> Checkpoint:
        """All that the run needs to go on from here, copied.

        is_evaluated  whether the evaluation that is due before the next step is done; `loss` is its held-out one
        """
        cursor = {
            "is_evaluated": is_evaluated,
            "batchings": [[since, asdict(batching)] for since, batching in self.batchings],
            "sources": list(self.rows.sources),
        }
        return resuming.take(
            state,
            {name: torch.from_numpy(column) for name, column in self.rows.columns().items()},
            cursor=cursor,
            schedule={**self.config.schedule.model_dump(), "total": self.fit.planned.steps},
            inputs=asdict(self.inputs_until(state.step)),
            loss=loss,
        )


def prepare(config: Config, session: Session, earlier: EarlierStarts = NEW_RUN) -> Prepared:
    """Checks, reads, encodes and plans, without loading the model."""
    checked = reading.check(config, session)
    session.say(*not_read(checked.train + checked.held_out))
    data = encode(config, checked, session)
    session.say(*_described(checked, data))
    stop_unless_trainable(config, checked, data)
    batchings = earlier.batchings(Batching(config.batch.examples, config.batch.tokens))
    lanes = session.world.size if isinstance(config.lanes, str) else config.lanes
    config = config.model_copy(update={"lanes": lanes})
    fit = plan(config, checked, data, session, batchings)
    session.say(*map(str, requests.unmet(config, checked, data, fit.planned)))
    share = shared(config, checked, session)
    expected = forecast.forecast(fit, checked.machine, share)
    where = f" on each of {share.ranks} ranks" if share.ranks > 1 else ""
    session.say(f"expected: {expected}{where}" if expected else "")
    checked = replace(checked, machine=replace(checked.machine, microbatch_tokens=fit.planned.microbatch_tokens))
    resolved, rows = _resolved(config, checked), RowDigests.of(data.train)
    inputs = _inputs(resolved, checked, data, session.world.size)
    prepared = Prepared(resolved, checked, share, data, fit, expected, rows, inputs, batchings, earlier)
    session.say(*earlier.changes(checked.folder, prepared.inputs_until(earlier.step), rows))
    if earlier.found is not None:
        session.say(f"resumed step {earlier.step} of {fit.planned.steps} (verified {earlier.found.files} files)")
    return prepared


def encode(config: Config, checked: Checked, session: Session) -> Dataset:
    """Every row's tokens and fate.

    Raises Problems where rows of a large source cannot be read, before any is encoded: of a small one they are told
    together with those that its template refuses.
    """
    refusals.stop_if_unreadable([survey for _, survey in checked.train + checked.held_out], config.data.allow_refused)
    share = config.data.eval if isinstance(config.data.eval, float) else 0.0
    rows = sum(survey.rows for _, survey in checked.train + checked.held_out)
    with display.counting(session.console, "encoding", rows) as advance:
        return build.encode_sources(
            checked.train,
            checked.encoder(),
            held_out=checked.held_out,
            share=share,
            seed=config.seed,
            execution=reading.execution(session, advance),
        )


def _described(checked: Checked, data: Dataset) -> list[str]:
    """What a user should know of the rows before training."""
    lines = [f"template: {text}" for text in checked.texts()]
    if checked.prompts:
        lines.append(f"evaluate.prompts: {checked.form}")
    lines += [f"warning: {text}" for text in (*checked.base.notes, checked.tokenizer.warning) if text]
    for source in data.ledgers:
        fates = ", ".join(f"{count} {fate}" for fate, count in source.fates.items() if count)
        share = source.target_tokens / max(1, source.tokens)
        lines.append(
            f"{source.source}: {source.shape}, {source.rows} rows ({fates}), {source.tokens} tokens, "
            f"{share:.0%} learnt, longest {source.longest}"
        )
        lines += [f"  {finding}" for finding in ledger.findings([source])]
    return lines


def stop_unless_trainable(config: Config, checked: Checked, data: Dataset) -> None:
    """Raises Problems where more rows are refused than is allowed, none is left, or the model lacks their tokens."""
    share = config.data.eval if isinstance(config.data.eval, float) else 0.0
    refusals.stop_if_lost(
        data,
        config.data.allow_refused,
        may_be_too_long=config.overflow != "error",
        share=share,
        way_out=ways_out.way_out(config, checked),
    )
    if config.checkpoint.keep_best and not data.held_out:
        by = f" by data.eval={share}; raise it" if share else "; set data.eval"
        raise InputError(f"checkpoint.keep_best: the best is found by held-out loss, and no row is held out{by}")
    refusals.stop_if_out_of_vocabulary(data, checked.tokenizer, checked.base.vocab_size)


def steps(config: Config, checked: Checked, data: Dataset, batchings: Sequence[tuple[int, Batching]] = ()) -> Loader:
    """Which example stands in which step, for the whole run, in micro-batches as they are asked for."""
    return loader.make(
        data.train,
        batchings or Batching(config.batch.examples, config.batch.tokens),
        epochs=config.epochs,
        seed=config.seed,
        microbatch_tokens=checked.machine.microbatch_tokens,
        normalize=config.loss.normalize,
        limit=config.steps,
        lanes=1 if isinstance(config.lanes, str) else config.lanes,
    )


def plan(
    config: Config, checked: Checked, data: Dataset, session: Session, batchings: Sequence[tuple[int, Batching]] = ()
) -> Fit:
    """`steps` in micro-batches that fit in memory.

    What fits is kept where rows are, unless the loss is a user's: what its code does may change without a sign.
    """
    planned = steps(config, checked, data, batchings)
    base, machine, is_auto = checked.base, checked.machine, config.microbatch_tokens == "auto"
    share, given = shared(config, checked, session), (planned, base, checked.objective, machine)
    make = partial(forecast.fit, *given, is_auto=is_auto, trainable=checked.trainable, share=share)
    if ":" in config.loss.name or not all(survey.content for _, survey in checked.train):
        return make()
    model = (models.folder(base) / "config.json").read_text(encoding="utf-8")
    kept_in = Cache(cache.root(), session.say)
    more = (model, repr(config.loss), str(is_auto), repr(checked.trainable))
    return forecast.kept_fit(kept_in, planned, data.train.digests(), machine, share, make, *more)


def shared(config: Config, checked: Checked, session: Session) -> Share:
    """What each rank has of the model."""
    return Share(
        ranks=session.world.size,
        shard=checked.shard,
        most=spread.most(config, session.world),
        is_ordered=spread.is_ordered(config, checked.machine.device),
        whole_in=whole_in(config, checked),
        memory=session.memory,
    )


def _inputs(config: Config, checked: Checked, data: Dataset, ranks: int) -> Inputs:
    """What the run is trained on; the plan is that of no step yet."""
    hf = checked.tokenizer.hf
    return Inputs(
        config=redacted_json(config.model_dump(mode="json")),
        model=_of_model(config, checked),
        tokenizer=resume.digest(hf.backend_tokenizer.to_str(), *map(str, sorted(hf.special_tokens_map.items()))),
        template=resume.digest(checked.chosen.source) if checked.is_chat else "",
        held_out=resume.digest(*map(str, RowDigests.of(data.held_out).digest.tolist())),
        ledger=resume.digest(*(json.dumps(source.as_json(), sort_keys=True) for source in data.ledgers)),
        plan="",
        versions=versions.installed() | hardware.computing(checked.machine.device),
        processes=ranks,
    )


def _of_model(config: Config, checked: Checked) -> str:
    """What the run begins with: the base, and the adapters that are merged and that it goes on from."""
    base = resume.fingerprint(models.folder(checked.base))
    given = [each for each in (config.merge, config.adapter and config.adapter.start) if each]
    return resume.digest(base, *(resume.fingerprint(Path(each)) for each in given)) if given else base


def _own_file(name: str) -> str:
    """The digest of the module of a user's function."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return next(iter(cache.file_digests([file]).values())) if file else ""


def _resolved(config: Config, checked: Checked) -> Config:
    """The configuration with every `auto` settled."""
    return config.model_copy(
        update={
            "output": str(checked.folder),
            "max_length": checked.policy.max_length,
            "microbatch_tokens": checked.machine.microbatch_tokens,
            "device": checked.machine.device.type,
            "precision": "bf16" if checked.machine.dtype == torch.bfloat16 else "fp32",
        }
    )
