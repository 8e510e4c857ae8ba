"""A loaded model -> the state that training changes. One way for every verb that computes a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from deft.core import hardware
from deft.core.hardware import Machine
from deft.distributed.sharding import Sharded
from deft.distributed.world import World
from deft.model import adapters, in_rows, merging, selftest, virtual_tokens
from deft.model import load as models
from deft.model.causal_lm import CausalLM
from deft.model.config import Quantize
from deft.model.cpu import document_attention
from deft.model.load import Base
from deft.model.trainable import Trainable
from deft.run import forecast
from deft.run import spread as sharing
from deft.run.config import Config
from deft.run.forecast import Fit
from deft.run.reading import Checked
from deft.training import compiling, objectives, optimizers
from deft.training.masters import Masters
from deft.training.state import TrainState, spread

Loaded = TypeVar("Loaded", bound=PreTrainedModel | None)


def build(
    config: Config,
    make_model: Callable[[], PreTrainedModel],
    machine: Machine,
    world: World,
    new_ids: range = range(0),
    base: Base | None = None,
) -> TrainState:
    """Model, masters in the machine's dtype, self-test in that, optimizer; torch's generators are seeded first.

    new_ids  those of tokens that the model is to get rows for
    base     what it was loaded from: masters get what lies in more bits there

    Dropout is on only where `dropout: config` asks for it. Raises InputError where the model cannot be loaded, or sees
    later tokens.
    """
    model, rows = _whole(config, make_model, machine.device, new_ids, base)
    masters = Masters(model.named_parameters(), machine.dtype, rows)
    causal_lm = selftest.choose(model)
    if objectives.load(config.loss.name, config.loss.options).uses_start:
        causal_lm.keep_start()
    return _state(config, causal_lm, masters, None, world)


def _whole(
    config: Config,
    make_model: Callable[[], PreTrainedModel],
    device: torch.device,
    new_ids: range,
    base: Base | None,
) -> tuple[PreTrainedModel, dict[str, slice]]:
    """A model with what is trained of it, and the rows of which parameters those are."""
    torch.manual_seed(config.seed)
    model = make_model()
    rows = Trainable(config.adapter, config.freeze, new_ids, config.quantize).apply(model, device)
    if config.adapter is not None and config.adapter.start is not None:
        fill = virtual_tokens.fill if config.adapter.is_virtual else adapters.fill
        fill(model, Path(config.adapter.start))
    if base is not None and config.merge is None:
        models.widen(base, model)
    return model, rows


def _state(config: Config, causal_lm: CausalLM, masters: Masters, shards: Sharded | None, world: World) -> TrainState:
    optimizer = optimizers.make(config.optimizer, masters)
    causal_lm.noise = config.neftune or 0.0
    causal_lm.model.train(config.dropout == "config")
    adapters.train_dropout(causal_lm.model)
    return TrainState(causal_lm, masters, optimizer, world, shards=shards)


def load(config: Config, checked: Checked, fit: Fit, world: World, *, owns_process: bool) -> TrainState:
    """The state of a run at its beginning: `build` around the base model, for the steps of a plan.

    owns_process  whether settings of the whole process may be changed: for the command line alone, as they stay
    """

    def settled(model: PreTrainedModel) -> PreTrainedModel:
        if owns_process:  # before the model's first product
            documents = forecast.largest(fit.planned)[0].documents
            hardware.settle_process(model.num_parameters(), document_attention.products(documents))
            compiling.keep_kernels()
        return model

    base, machine, new_ids = checked.base, checked.machine, checked.tokenizer.new_ids
    layout = sharing.layout(config, min(checked.shard, world.size), world, machine.device)
    if layout is None:
        whole = partial(pretrained, base, machine, config.merge, config.quantize)
        state = build(config, lambda: settled(whole()), machine, world, new_ids, base)
    else:
        cut = spread(*_to_spread(config, checked, settled), machine.dtype, layout, machine.device)
        state = _state(config, *cut, world)
    state.causal_lm.checkpointing = fit.checkpointing
    return state


def _to_spread(
    config: Config, checked: Checked, settled: Callable[[PreTrainedModel], PreTrainedModel]
) -> tuple[PreTrainedModel, in_rows.Rows]:
    """A model without memory, and where its rows are read: in the files; where they do not have each weight as it is,
    as with merged adapters, new tokens, or weights that transformers makes of others, in a whole one on the CPU."""
    base, machine, new_ids = checked.base, checked.machine, checked.tokenizer.new_ids
    if config.merge is None and not new_ids:
        model = _in_its_dtype(base, _stored_dtype(base, machine), partial(models.without_weights, base))
        if model is not None:
            torch.manual_seed(config.seed)
            rows = in_rows.of_files(settled(model), base, checked.trainable, machine.dtype)
            if rows is not None:
                return model, rows
    host = replace(machine, device=torch.device("cpu"))
    whole = partial(pretrained, base, host, config.merge)
    model, parts = _whole(config, lambda: settled(whole()), host.device, new_ids, base)
    assert not parts, "rows of new tokens alone are not spread"
    return model, in_rows.of_whole(model, machine.dtype)


def whole_in(config: Config, checked: Checked) -> torch.dtype | None:
    """The dtype of weights that are whole on a rank's device before it keeps its rows: on a CPU, with merged adapters
    or new tokens. None where a rank reads its rows alone, or has the whole elsewhere."""
    if checked.machine.device.type != "cpu" or not (config.merge or checked.tokenizer.new_ids):
        return None
    return torch.float32 if config.merge else _stored_dtype(checked.base, checked.machine)


def _stored_dtype(base: Base, machine: Machine) -> torch.dtype:
    """What a model of this base is loaded in: most of its weights lie in it, or it has all bits of theirs."""
    return torch.bfloat16 if base.dtype == machine.dtype_name == "bfloat16" else torch.float32


def pretrained(base: Base, machine: Machine, merge: str | None = None, quantize: Quantize = "off") -> PreTrainedModel:
    """The model of a folder or hub id, on the machine's device, with the adapter that is to be merged in its weights.

    One that is to be quantised is on the CPU, as its whole weights may not fit on the device.

    bf16 weights need no fp32 copy to be read into; all others, and those that are changed here, are read in fp32, so
    that masters lose nothing. Those that lie in fp32 among others in bf16 get their bits back in `build`.
    """
    device = machine.device if quantize == "off" else "cpu"
    is_exact = merge is None and (quantize == "off" or len(base.dtypes) == 1)
    dtype = _stored_dtype(base, machine) if is_exact else torch.float32
    model = _in_its_dtype(base, dtype, lambda dtype: models.load(base, device=device, dtype=dtype))
    return model if merge is None else merging.merge(model, Path(merge))


def _in_its_dtype(base: Base, dtype: torch.dtype, load: Callable[[torch.dtype], Loaded]) -> Loaded:
    """What is loaded in `dtype`, or in fp32 where weights that lie in it could not be given their bits back."""
    found = load(dtype)
    is_short = found is not None and dtype == torch.bfloat16 and not models.has_all_wide(base, found)
    return load(torch.float32) if is_short else found
