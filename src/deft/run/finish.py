"""A trained model -> final/: the export, compared with what is in memory, and the report."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deft.core import files, versions
from deft.core.redact import redacted
from deft.encoding.rows import as_chat
from deft.export import folder as export
from deft.export.folder import ExportError
from deft.model import multimodal
from deft.run.prepare import Prepared
from deft.run.reading import Session
from deft.tracking import report
from deft.training.state import TrainState

EXPORT_ROWS = 3
"""How many training examples are compared between the model in memory and the exported one."""


def finish(prepared: Prepared, state: TrainState, session: Session) -> None:
    """The export, compared with what is in memory before it is called done, and the report."""
    checked, model, tokenizer = prepared.checked, state.causal_lm.model, prepared.checked.tokenizer.hf
    folder = checked.folder / "final"
    masters, stop_ids = _masters(prepared, state), _stop_ids(prepared)
    if not folder.exists():  # else an earlier start was stopped after it was put in place
        export.export(
            model,
            tokenizer,
            folder,
            dtype=getattr(torch, checked.base.dtype),
            stop_ids=stop_ids,
            chat_template=None,
            card=_card(prepared),
            weights=masters,
            processor=multimodal.processor_files(checked.base.path),
        )
    state.world.wait()
    try:
        check = export.verify(
            folder,
            model,
            tokenizer,
            [example[0].tokens.tolist() for example in prepared.data.train[:EXPORT_ROWS]],
            _first_chat(prepared),
            weights=masters,
            stop_ids=stop_ids,
        )
    except ExportError:
        files.remove(folder)
        raise
    report.write(checked.folder)
    session.say(
        f"{folder}: {check.dtype}, reloaded by plain transformers and compared: {check.tensors} tensors equal, "
        f"logits within {check.largest_error:.1e}, {check.texts} texts encoded alike"
    )


def _masters(prepared: Prepared, state: TrainState) -> Mapping[str, torch.Tensor] | None:
    """The fp32 weights to export; None where the model's own already have the dtype that is saved."""
    is_saved_as_is = prepared.checked.base.dtype == prepared.checked.machine.dtype_name
    return None if is_saved_as_is else state.masters


def _stop_ids(prepared: Prepared) -> list[int]:
    """The ids of the marks that ended learnt turns, as far as they are single tokens, and EOS where text was learnt."""
    tokenizer, marks = prepared.checked.tokenizer, prepared.data.marks
    ids = [tokenizer.special_tokens[mark] for mark in sorted(marks) if mark in tokenizer.special_tokens]
    eos = [] if marks or tokenizer.eos_id is None else [tokenizer.eos_id]
    return list(dict.fromkeys([*ids, *eos]))


def _first_chat(prepared: Prepared) -> list[dict[str, str]] | None:
    """The messages of the first chat that is trained, for comparing templates."""
    if not prepared.checked.is_chat:
        return None
    conversation = prepared.checked.train[0][1].first
    messages = as_chat(conversation.messages) if conversation else []
    return [{"role": message.role, "content": message.content} for message in messages]


def _card(prepared: Prepared) -> str:
    config, data = prepared.config, prepared.data
    return export.model_card(
        {
            "name": prepared.checked.folder.name,
            "base_model": redacted(config.model),
            "data": [{"path": source.source, "rows": source.rows} for source in data.ledgers],
            "tokens": sum(source.tokens for source in data.ledgers),
            "target_tokens": sum(source.target_tokens for source in data.ledgers),
            "hyperparameters": {
                "optimizer": config.optimizer.name,
                "learning rate": config.optimizer.lr,
                "schedule": config.schedule.name,
                "epochs": config.epochs,
                "steps": prepared.loader.steps,
                "batch": config.batch.model_dump(exclude_none=True),
                "max_length": prepared.checked.policy.max_length,
                "seed": config.seed,
            },
            "versions": versions.installed(),
        }
    )
