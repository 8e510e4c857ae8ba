"""Low-rank adapters inside a model's linear layers, by peft: put in, switched off for a while, and named.

peft changes the layers of the very model (`inject_adapter_in_model`); its wrapper, which would hide the model's names
and its forward, is not used. A layer that was `q_proj` then holds `q_proj.base_layer.weight`, frozen, and
`q_proj.lora_A.default.weight` and the like, which are trained.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deft.core.errors import InputError
from deft.model import multimodal, security
from deft.model.config import AdapterConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

NAME = "default"
"""What peft calls the only adapter in the names of its parameters."""

WEIGHTS = "adapter_model.safetensors"
"""Where an adapter in peft's form has its weights."""

BASE = ".base_layer"
"""What peft puts into the name of a weight that has an adapter."""

_ROWS = re.compile(r"\.weight\[(\d+):(\d+)\]$")
"""The end of the name that `Masters` gives to some rows of a matrix."""


def attach(model: PreTrainedModel, settings: AdapterConfig) -> None:
    """Puts adapters into a model and freezes all else. To be called before the self-test.

    A is drawn from torch's generator, B is zero: the model's outputs are at first what they were. Raises InputError
    where peft is not installed, or no layer of the model is meant.
    """
    peft = imported_peft("adapter")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out of GPT-2's layers, which peft then sets itself
            peft.inject_adapter_in_model(peft_config(model, settings), model, adapter_name=NAME)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, nn.Linear)})
        what = " ".join(str(error).split())[:200]
        raise InputError(f"adapter.target: {what}; this model's linear layers: {', '.join(names)}") from error
    if not (found := layers(model)):
        raise InputError(f"adapter.target: no layer of this model is {settings.target!r}; leave it out for all of them")
    _stop_if_unmergeable(model, found)
    for pattern in (*settings.ranks, *settings.alphas):
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in found):
            key = "ranks" if pattern in settings.ranks else "alphas"
            raise InputError(f"adapter.{key}: {pattern!r} is no layer with an adapter; one is {min(found)}")


def _stop_if_unmergeable(model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """InputError where an adapter is one to several matrices, or to one that has two uses."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    bases = [each.get_base_layer() if is_adapted(each) else each for each in ends]
    is_tied = len({id(getattr(each, "weight", None)) for each in bases}) == 1
    for name, layer in found.items():
        if not isinstance(getattr(layer.get_base_layer(), "weight", None), Tensor):
            raise InputError(f"adapter.target: {name} holds several matrices, which has no adapter here; leave it out")
        if is_tied and any(layer is each for each in ends):
            what = "is tied to the other end of the model, which would change with it"
            raise InputError(f"adapter.target: {name} {what}; leave it out")


def imported_peft(key: str) -> Any:
    """Raises InputError where it is not installed; key is the one that asks for it."""
    try:
        with security.without_kernels():
            import peft
    except ImportError as error:
        raise InputError(f"{key}: needs peft; pip install 'deft-sft[peft]'") from error
    return peft


def fill(model: nn.Module, folder: Path) -> None:
    """Gives the adapters of a model the values of those in a folder of peft's form.

    peft writes the base weights of embeddings that have an adapter as well, which must be the model's.

    Raises InputError where they are not for these layers, or pickled.
    """
    path, found, every = folder / WEIGHTS, stored(folder), dict(model.named_parameters())
    own = {peft_name(name): each for name, each in every.items() if "lora_" in name}
    base = {peft_name(name): each for name, each in every.items() if f"{BASE}." in name}
    known = {key for key in base.keys() & found.keys() if torch.equal(base[key].cpu().to(found[key].dtype), found[key])}
    odd = sorted(own.keys() ^ (found.keys() - known)) or [name for name in own if own[name].shape != found[name].shape]
    if odd:
        raise InputError(f"{path}: {odd[0]} is not what this base model and adapter_config.json ask for")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def is_alone(folder: Path) -> bool:
    """Whether a folder of peft's form has no weights of the base as well. Raises InputError as `stored` does."""
    return all("lora_" in name for name in stored(folder))


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder of peft's form. Raises InputError where they are pickled or cannot be read."""
    path = folder / WEIGHTS
    if not path.is_file():
        fix = "save it with peft's save_pretrained, which writes safetensors"
        raise InputError(f"{folder}: has no {WEIGHTS}; {fix}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be read ({error}); copy it again") from error


def peft_name(name: str) -> str:
    """What peft's files call a parameter of an adapter.

    >>> peft_name("model.layers.0.mlp.up_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    >>> peft_name("lm_head.weight[32000:32008]")  # rows of new tokens
    'base_model.model.lm_head.token_adapter.trainable_tokens_delta'
    """
    name = _ROWS.sub(".token_adapter.trainable_tokens_delta", name)
    name = name.replace(f".lora_magnitude_vector.{NAME}.weight", ".lora_magnitude_vector")
    return "base_model.model." + name.replace(f".{NAME}", "")


def token_indices(names: Iterable[str]) -> dict[str, list[int]] | None:
    """What peft's files say of parameters that are rows of new tokens; None where there are none.

    >>> token_indices(["model.norm.weight", "model.embed_tokens.weight[300:302]"])
    {'model.embed_tokens': [300, 301]}
    """
    found = {name: match for name in names if (match := _ROWS.search(name))}
    return {name[: match.start()]: [*range(int(match[1]), int(match[2]))] for name, match in found.items()} or None


def peft_config(model: PreTrainedModel, settings: AdapterConfig) -> LoraConfig:
    """What peft is told; of a multimodal model only the language model is meant."""
    from peft import LoraConfig

    others, alpha = None, settings.alpha
    if multimodal.is_multimodal(model.config):
        body = multimodal.text_body(model)
        prefix = next(name for name, each in model.named_modules() if each is body)
        others = rf"(?!{re.escape(prefix)}\.).*"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=cast(int, int(alpha) if alpha.is_integer() else alpha),
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings),
        exclude_modules=others,
        init_lora_weights=True if settings.init == "kaiming" else settings.init,
        rank_pattern=dict(settings.ranks),
        alpha_pattern=dict(settings.alphas),
        use_rslora=settings.name == "rslora",
        use_dora=settings.name == "dora",
    )


def _targets(model: PreTrainedModel, settings: AdapterConfig) -> str | list[str]:
    """For peft. Of all linear layers it makes the experts of a mixture too, and its router: several matrices in one."""
    if settings.target != "all-linear" or not any(each.ndim == 3 for each in model.parameters()):
        return settings.target if isinstance(settings.target, str) else list(settings.target)
    head = model.get_output_embeddings()
    return [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head]


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that have an adapter, by name; none where peft was never asked for."""
    found: dict[str, Any] = {name: each for name, each in model.named_modules() if is_adapted(each)}
    return found


def is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")


def is_plain(module: Any) -> bool:
    """Whether a layer's adapter is the sum of its two products and nothing else: no DoRA, dropout or bias."""
    if not is_adapted(module) or module.lora_variant or [*module.lora_A] != [NAME]:
        return False
    return type(module.lora_dropout[NAME]) is nn.Identity and not module.lora_bias[NAME]


def matrices(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """A [r, in] and B [out, r] of a layer's adapter; None twice where it has none."""
    return (module.lora_A[NAME].weight, module.lora_B[NAME].weight) if is_adapted(module) else (None, None)


def lengths(model: nn.Module) -> dict[str, tuple[str, Callable[[Tensor, int, int], Tensor]]] | None:
    """Of each parameter of DoRA: the name of the weight that it has the lengths of, and how they are made of its rows
    [start, stop), with the adapters as they are now. None where they are lengths of columns."""
    found: dict[str, tuple[str, Callable[[Tensor, int, int], Tensor]]] = {}
    for name, layer in layers(model).items():
        for kind, made in layer.lora_magnitude_vector.items():
            if type(made).__name__ != "DoraLinearLayer" or made.fan_in_fan_out:
                return None
            a, b = (each.detach() for each in matrices(cast(Any, layer)) if each is not None)
            length = partial(_lengths, made, layer.scaling[NAME], a, b)
            found[f"{name}.lora_magnitude_vector.{kind}.weight"] = f"{name}{BASE}.weight", length
    return found


def _lengths(made: Any, scaling: float, a: Tensor, b: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
    """The whole product, some rows of which would not have the bits of all."""
    found: Tensor = made.get_weight_norm(weight, (b @ a)[start:stop], scaling)
    return found


def are_computed(block: nn.Module) -> bool:
    """Whether the adapters inside a block, if it has any, count: none is switched off or merged."""
    return not any(each.disable_adapters or each.merged for each in layers(block).values())


def train_dropout(model: nn.Module) -> None:
    """The adapters' dropout is on while the rest of the model is in evaluation mode."""
    for layer in layers(model).values():
        layer.lora_dropout.train()


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model is its base."""
    found = layers(model).values()
    for layer in found:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in found:
            layer.enable_adapters(True)


def take_out(model: nn.Module) -> dict[str, str]:
    """Puts each adapted layer's base in its place; what parameters are called now -> what they were called."""
    before = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, layer in layers(model).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    return {name: before[id(parameter)] for name, parameter in model.named_parameters()}
