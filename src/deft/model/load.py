"""A Hugging Face folder or hub id -> a model. Nothing in it can run code: no pickle, no remote code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig
from transformers.utils import cached_file

from deft.core import hardware
from deft.core.errors import InputError, Problem
from deft.model import multimodal, security
from deft.model.trainable import Trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION_LAYERS = {"full_attention": False, "sliding_attention": True}
"""Layer types of a config that our attention computes: whether they have a window."""
_RECURRENT_LAYERS = frozenset({"linear_attention", "conv"})


@dataclass(frozen=True, slots=True)
class Base:
    """What a model's config says, read without its weights.

    max_positions  None where the architecture sets no limit
    dtype          that of the saved weights, such as "bfloat16"
    stop_ids       tokens that end an answer, as the model's generation_config has them
    """

    path: str
    model_type: str
    vocab_size: int
    max_positions: int | None
    dtype: str
    is_tied: bool
    stop_ids: tuple[int, ...]


def inspect(path: str, needs_weights: bool = True) -> Base:
    """What a folder or hub id holds, without reading its weights.

    Raises InputError where it is no model folder, has no safetensors weights (unless it needs none), or is an
    architecture that transformers does not know as a causal language model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() or _looks_like_a_path(path):
        _check_folder(folder, needs_weights)
        path = str(folder)
    with _explained(path):
        security.check_config(path)
        security.check_index(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if multimodal.auto_class(config) is None:
        fix = "name a model that transformers lists under AutoModelForCausalLM"
        raise _refusal(path, f"{config.model_type} is not a causal language model", fix)
    text = config.get_text_config()
    return Base(
        path=path,
        model_type=config.model_type,
        vocab_size=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        is_tied=bool(getattr(config, "tie_word_embeddings", False)),
        stop_ids=_stop_ids(path, text),
    )


def folder(base: Base) -> Path:
    """Where its files lie on this machine. Raises InputError where they have gone since."""
    with _explained(base.path):
        found = cached_file(base.path, "config.json")
    assert found is not None, base.path
    return Path(found).parent


def load(base: Base, *, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `dtype` on `device`, in evaluation mode, with transformers' own attention.

    Of a multimodal one all but the language model is frozen.

    Raises InputError where weights are unreadable, missing, or do not fit the config.
    """
    with _explained(base.path):
        try:
            model, report = _read(base, dtype, "sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, report = _read(base, dtype, "eager")
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random numbers in their place.
        what = f"{len(missing)} weights are not in its files, {missing[0]} first"
        raise _refusal(base.path, what, "download or save the model again")
    multimodal.freeze_all_but_text(model)
    return model.to(device).eval()


def _read(base: Base, dtype: torch.dtype, attention: str) -> Any:
    """The model and what was missing in its files. The attention is named so that a config.json cannot choose one: that
    could be a kernel to be fetched and run."""
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    return multimodal.auto_class(config).from_pretrained(
        base.path,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )


def can_take_attention(model: PreTrainedModel) -> bool:
    """Whether the architecture reaches its attention through transformers' AttentionInterface.

    transformers has no public word for it: set_attn_implementation only logs a warning, and does half of it.
    """
    return model._can_set_attn_implementation()


def own_attention(model: PreTrainedModel) -> str:
    """The attention transformers would choose for this architecture: "sdpa", or "eager" where it has no other."""
    return model.get_correct_attn_implementation(None)


def unpackable(model: PreTrainedModel) -> str:
    """Why documents of this model cannot be packed, as far as its config tells, or nothing. It needs no weights."""
    expected = expected_windows(model)
    if isinstance(expected, str):
        return expected
    return "" if can_take_attention(model) else "attention does not go through transformers' AttentionInterface"


def expected_windows(model: PreTrainedModel) -> list[bool] | str:
    """For each layer with attention whether it has a sliding window; or why our attention cannot stand in for it."""
    text = model.config.get_text_config()
    config = text.to_dict()
    types = config.get("layer_types")
    if types is None:
        return [config.get("sliding_window") is not None] * text.num_hidden_layers
    if unknown := sorted(set(types) - _ATTENTION_LAYERS.keys() - _RECURRENT_LAYERS):
        return f"its layers of type {unknown[0]} need a mask of their own"
    return [_ATTENTION_LAYERS[kind] for kind in types if kind in _ATTENTION_LAYERS]


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """parameters, tied ones once, and those of them that are trained; why documents will run one at a time, as far as
    the config tells, else nothing."""

    parameters: int
    trained: int
    against_packing: str

    def state_bytes(self, dtype: torch.dtype) -> int:
        """What is kept of a trained parameter: fp32 master, gradient, two moments, and a copy to compute with; of a
        frozen one the copy alone.

        Activations come on top.
        """
        copy = 0 if dtype == torch.float32 else dtype.itemsize
        return self.trained * (4 * 4 + copy) + (self.parameters - self.trained) * dtype.itemsize


def summarise(base: Base, trainable: Trainable) -> ModelSummary:
    """The model as its config describes it, made without memory for its weights.

    Raises InputError where `trainable` does not fit it.
    """
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    with torch.device("meta"):
        # The attention is named so that a config.json cannot choose one, as in `load`.
        model = multimodal.auto_class(config).from_config(config, attn_implementation="eager", trust_remote_code=False)
        multimodal.freeze_all_but_text(model)
        trainable.apply(model)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    return ModelSummary(sum(size for size, _ in sizes), trained, unpackable(model))


def stop_ids(*holders: Any) -> tuple[int, ...]:
    """The token ids that end an answer, of the first of `holders` (generation config, config, tokenizer) that has any.

    >>> stop_ids(GenerationConfig(), GenerationConfig(eos_token_id=2)), stop_ids(GenerationConfig(eos_token_id=[5, 6]))
    ((2,), (5, 6))
    """
    found = next((ids for each in holders if (ids := getattr(each, "eos_token_id", None)) is not None), ())
    return (found,) if isinstance(found, int) else tuple(found)


def _looks_like_a_path(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _check_folder(folder: Path, needs_weights: bool) -> None:
    if not folder.is_dir():
        fix = "name a model folder or a hub id such as Qwen/Qwen2.5-0.5B"
        raise _refusal(str(folder), "there is no such folder", fix)
    if (folder / "final" / "config.json").is_file():
        raise _refusal(str(folder), "this is a run", f"its model is {folder / 'final'}")
    if (folder / "cursor.json").is_file() and folder.parent.name == "checkpoints":
        again = f"resume={folder.name} steps={int(folder.name.rpartition('-')[2])}"
        fix = f"{folder.parents[1]}/final is one; for one of this step move that away and train again with {again}"
        raise _refusal(str(folder), "this is a checkpoint of a run, not a model", fix)
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(child.name for child in folder.iterdir())[:5]) or "nothing"
        what = f"not a model folder: it has no config.json, but {found}"
        raise _refusal(str(folder), what, "name the folder that has it")
    security.check_adapter(folder)
    if needs_weights and not any(folder.glob("*.safetensors")):
        pickled = sorted(child.name for pattern in ("*.bin", "*.pt", "*.pth") for child in folder.glob(pattern))
        what = f"its weights are pickled ({pickled[0]}), and a pickle can run code" if pickled else "it has no weights"
        raise _refusal(str(folder), what, "save it with model.save_pretrained, which writes safetensors")


def _stop_ids(path: str, config: Any) -> tuple[int, ...]:
    try:
        return stop_ids(GenerationConfig.from_pretrained(path))
    except OSError:
        return stop_ids(config)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Whatever transformers objects to, as one line that says what to do."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if hardware.is_out_of_memory(error):
            raise
        raise _refusal(path, *_reason(str(error))) from error


def _reason(message: str) -> tuple[str, str]:
    """What is wrong, and the fix, from a message of transformers 5."""
    if "trust_remote_code" in message or "custom code" in message:
        return "it brings its own code, which is not run", "use an architecture that is part of transformers"
    if "does not recognize this architecture" in message or "model_type" in message:
        return "its config.json names no architecture that this transformers knows", "upgrade transformers"
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no reason given")
    return f"it cannot be loaded: {first}", "check the name, or download or save the model again"


def _refusal(path: str, what: str, fix: str) -> InputError:
    return InputError(str(Problem(path, what, fix)))
