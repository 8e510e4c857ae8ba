"""A loaded model -> the state that training changes. One way for every verb that computes a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deft.core import hardware
from deft.core.hardware import Machine
from deft.distributed.world import World
from deft.model import adapters, merging, selftest, virtual_tokens
from deft.model import load as models
from deft.model.config import Quantize
from deft.model.cpu import document_attention
from deft.model.load import Base
from deft.model.trainable import Trainable
from deft.run import forecast
from deft.run.config import Config
from deft.run.forecast import Fit
from deft.run.reading import Checked
from deft.training import compiling, objectives, optimizers
from deft.training.masters import Masters
from deft.training.state import TrainState


def build(
    config: Config,
    make_model: Callable[[], PreTrainedModel],
    machine: Machine,
    world: World,
    new_ids: range = range(0),
) -> TrainState:
    """Model, self-test, masters in the machine's dtype, optimizer; torch's generators are seeded first.

    new_ids  those of tokens that the model is to get rows for

    Dropout is on only where `dropout: config` asks for it. Raises InputError where the model cannot be loaded, or sees
    later tokens.
    """
    torch.manual_seed(config.seed)
    model = make_model()
    trainable = Trainable(config.adapter, config.freeze, new_ids, config.quantize)
    rows = trainable.apply(model, machine.device)
    if config.adapter is not None and config.adapter.start is not None:
        fill = virtual_tokens.fill if config.adapter.is_virtual else adapters.fill
        fill(model, Path(config.adapter.start))
    causal_lm = selftest.choose(model)
    masters = Masters(model.named_parameters(), machine.dtype, rows)
    if objectives.load(config.loss.name, config.loss.options).uses_start:
        causal_lm.keep_start()
    optimizer = optimizers.make(config.optimizer, masters)
    causal_lm.noise = config.neftune or 0.0
    model.train(config.dropout == "config")
    adapters.train_dropout(model)
    return TrainState(causal_lm, masters, optimizer, world)


def load(config: Config, checked: Checked, fit: Fit, world: World, *, owns_process: bool) -> TrainState:
    """The state of a run at its beginning: `build` around the base model, for the steps of a plan.

    owns_process  whether settings of the whole process may be changed: for the command line alone, as they stay
    """

    def make_model() -> PreTrainedModel:
        model = pretrained(checked.base, checked.machine, config.merge, config.quantize)
        if owns_process:  # before the model's first product
            documents = forecast.largest(fit.planned)[0].documents
            hardware.settle_process(model.num_parameters(), document_attention.products(documents))
            compiling.keep_kernels()
        return model

    state = build(config, make_model, checked.machine, world, checked.tokenizer.new_ids)
    state.causal_lm.checkpointing = fit.checkpointing
    return state


def pretrained(base: Base, machine: Machine, merge: str | None = None, quantize: Quantize = "off") -> PreTrainedModel:
    """The model of a folder or hub id, on the machine's device, with the adapter that is to be merged in its weights.

    One that is to be quantised is on the CPU, as its whole weights may not fit on the device.

    bf16 weights need no fp32 copy to be read into; all others, and those that are changed here, are read in fp32, so
    that masters lose nothing.
    """
    is_half = base.dtype == machine.dtype_name == "bfloat16" and merge is None
    device = machine.device if quantize == "off" else "cpu"
    model = models.load(base, device=device, dtype=torch.bfloat16 if is_half else torch.float32)
    return model if merge is None else merging.merge(model, Path(merge))
