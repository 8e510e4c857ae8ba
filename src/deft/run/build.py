"""A loaded model -> the state that training changes. One way for every verb that computes a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deft.core import hardware
from deft.core.hardware import Machine
from deft.distributed.world import World
from deft.model import adapters, selftest
from deft.model import load as models
from deft.model.cpu import document_attention
from deft.model.load import Base
from deft.model.trainable import Trainable
from deft.run import forecast
from deft.run.config import Config
from deft.run.forecast import Fit
from deft.run.reading import Checked
from deft.training import compiling, optimizers
from deft.training.masters import Masters
from deft.training.state import TrainState


def build(config: Config, make_model: Callable[[], PreTrainedModel], machine: Machine, world: World) -> TrainState:
    """Model, self-test, masters in the machine's dtype, optimizer; torch's generators are seeded first.

    Dropout is on only where `dropout: config` asks for it. Raises InputError where the model cannot be loaded, or sees
    later tokens.
    """
    torch.manual_seed(config.seed)
    model = make_model()
    Trainable(config.adapter, config.freeze).apply(model)
    if config.adapter is not None and config.adapter.start is not None:
        adapters.fill(model, Path(config.adapter.start))
    causal_lm = selftest.choose(model)
    masters = Masters(model.named_parameters(), machine.dtype)
    optimizer = optimizers.make(config.optimizer, masters)
    model.train(config.dropout == "config")
    adapters.train_dropout(model)
    return TrainState(causal_lm, masters, optimizer, world)


def load(config: Config, checked: Checked, fit: Fit, world: World, *, owns_process: bool) -> TrainState:
    """The state of a run at its beginning: `build` around the base model, for the steps of a plan.

    owns_process  whether settings of the whole process may be changed: for the command line alone, as they stay
    """

    def make_model() -> PreTrainedModel:
        model = pretrained(checked.base, checked.machine)
        if owns_process:  # before the model's first product
            documents = forecast.largest(fit.planned)[0].documents
            hardware.settle_process(model.num_parameters(), document_attention.products(documents))
            compiling.keep_kernels()
        return model

    state = build(config, make_model, checked.machine, world)
    state.causal_lm.checkpointing = fit.checkpointing
    return state


def pretrained(base: Base, machine: Machine) -> PreTrainedModel:
    """The model of a folder or hub id, on the machine's device.

    bf16 weights need no fp32 copy to be read into; all others are read in fp32, so that masters lose nothing.
    """
    is_half = base.dtype == machine.dtype_name == "bfloat16"
    return models.load(base, device=machine.device, dtype=torch.bfloat16 if is_half else torch.float32)
