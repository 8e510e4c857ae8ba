"""A Hugging Face folder or hub id -> a model. Nothing in it can run code: no pickle, no remote code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from deft.core import hardware
from deft.core.errors import DeftError, InputError, Problem
from deft.model import base_config, multimodal, quantized, security, virtual_tokens, weight_files
from deft.model.config import is_adapter
from deft.model.trainable import Trainable
from deft.model.weight_files import TensorHeader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION_LAYERS = {"full_attention": False, "sliding_attention": True}
"""Layer types of a config that our attention computes: whether they have a window."""
_AGAIN = "download or save the model again"
_RECURRENT_LAYERS = frozenset({"linear_attention", "conv"})


@dataclass(frozen=True, slots=True)
class Base:
    """What a model's config says, read without its weights.

    max_positions  None where the architecture sets no limit
    dtype          that of most weights in the files, such as "bfloat16"
    stop_ids       tokens that end an answer, as the model's generation_config has them
    left_over      weights of its files that the architecture does not take
    dtypes         in which the files have weights, as torch names them
    """

    path: str
    model_type: str
    vocab_size: int
    max_positions: int | None
    dtype: str
    is_tied: bool
    stop_ids: tuple[int, ...]
    left_over: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What is to be said of its weights before training, or nothing."""
        if not self.left_over:
            return self._mixed
        count = f"{len(self.left_over)} weight{'s' if len(self.left_over) > 1 else ''}"
        what = f"have no place in {self.model_type} as its config.json describes it, {self.left_over[0]} first"
        return f"{self.path}: {count} of its files {what}; not trained, carried over into final/ as they are"

    @property
    def _mixed(self) -> str:
        if len(self.dtypes) < 2:
            return ""
        how = f"its weights lie in {' and '.join(self.dtypes)}; final/ has all of them in {self.dtype}, as most are"
        return f"{self.path}: {how}, and export.dtype=fp32 keeps their bits"


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
        config = base_config.read(path)
        security.check_adapter(path)
        tensors = weight_files.stored(base_config.folder(path)) if needs_weights else {}
        left_over = _left_over(path, config, tensors) if tensors else ()
        text = config.get_text_config()
        stops = _stop_ids(path, text)
    return Base(
        path=path,
        model_type=config.model_type,
        vocab_size=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        dtype=weight_files.dtype(tensors) or str(config.dtype or torch.float32).removeprefix("torch."),
        is_tied=bool(getattr(config, "tie_word_embeddings", False)),
        stop_ids=stops,
        left_over=left_over,
        dtypes=weight_files.dtypes(tensors),
    )


def folder(base: Base) -> Path:
    """Where its files lie on this machine. Raises InputError where they have gone since."""
    with _explained(base.path):
        return base_config.folder(base.path)


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
    _refuse_misfits(base.path, report)
    _refuse_broken(base.path, model)
    multimodal.freeze_all_but_text(model)
    return model.to(device).eval()


def _read(base: Base, dtype: torch.dtype, attention: str) -> Any:
    """The model and what was missing in its files. The attention is named so that a config.json cannot choose one: that
    could be a kernel to be fetched and run."""
    return _plain(base.path, base_config.read(base.path), dtype=dtype, attn_implementation=attention)


def _plain(path: str, config: Any, **options: Any) -> Any:
    """The model as plain transformers makes it, and its report; nothing is unpickled, no code of its own runs."""
    options = {"attn_implementation": "eager", "use_safetensors": True, "trust_remote_code": False, **options}
    return multimodal.auto_class(config).from_pretrained(path, config=config, output_loading_info=True, **options)


def _left_over(path: str, config: Any, tensors: Mapping[str, TensorHeader]) -> tuple[str, ...]:
    """Weights of its files that the architecture has no place for; none is read.

    Not those that it computes anew on each load. Raises InputError where weights that it needs are not there, or have
    another shape than the config says.
    """
    model, report = _plain(path, config, device_map="meta", ignore_mismatched_sizes=True)
    _refuse_misfits(path, report)
    _refuse_integers(path, model, tensors)
    silent = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    names = {name for name, each in tensors.items() if each.file.name == weight_files.CARRIED}
    names |= {name for name in tensors if any(pattern.search(name) for pattern in silent)}
    return tuple(sorted(name for name in names | set(report["unexpected_keys"]) if not _COMPUTED.search(name)))


def _refuse_integers(path: str, model: PreTrainedModel, tensors: Mapping[str, TensorHeader]) -> None:
    """Weights whose header says that they are whole numbers, where the model computes with others."""
    for name, parameter in model.named_parameters():
        if name in tensors and parameter.is_floating_point() and tensors[name].dtype[0] in "IU":
            what = f"{name} is {tensors[name].dtype} in {tensors[name].file.name}, and the model computes with floats"
            raise _refusal(path, what, _AGAIN)


def _refuse_misfits(path: str, report: Mapping[str, Any]) -> None:
    """transformers would go on with random numbers in the place of weights that are missing or of another shape."""
    faults = []
    if missing := sorted(report["missing_keys"]):
        faults.append(f"{_counted(missing)} not in its files, {missing[0]} first")
    if misfits := sorted(report["mismatched_keys"]):
        name, found, meant = misfits[0]
        shapes = f"{name} first: {list(found)}, and config.json makes it {list(meant)}"
        faults.append(f"{_counted(misfits)} of another shape in its files, {shapes}")
    if faults:
        raise _refusal(path, f"it cannot be loaded: {'; '.join(faults)}", _AGAIN)


def _counted(found: Sequence[Any]) -> str:
    return f"{len(found)} weight{'s are' if len(found) > 1 else ' is'}"


@torch.no_grad()
def _refuse_broken(path: str, model: PreTrainedModel) -> None:
    """Weights that are no numbers: no step could mend them, and no rate is to blame."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if not torch.stack(parameter.aminmax()).isfinite().all():
            broken = ~parameter.isfinite()
            row = int(broken.nonzero()[0][0])
            what = f"{name} has {int(broken.sum()):,} values that are not finite, in row {row} first"
            raise _refusal(path, what, "save the model again with numbers there, as in its other rows")


_COMPUTED = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
"""Tables that old checkpoints hold and each load makes anew."""


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
    if isinstance(virtual_tokens.of(model), virtual_tokens.Prefix):
        return "prefix tuning goes on from keys and values of one document"
    if positions_move(model.config):
        return "its positions follow the longest text of a batch (rope type dynamic or longrope)"
    expected = expected_windows(model)
    if isinstance(expected, str):
        return expected
    return "" if can_take_attention(model) else "attention does not go through transformers' AttentionInterface"


def positions_move(config: Any) -> bool:
    """True where the rotary frequencies follow the longest text seen."""
    described = str(config.get_text_config().to_dict().get("rope_parameters"))
    return "dynamic" in described or "longrope" in described


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
    the config tells, else nothing; those that are quantised, and what they take."""

    parameters: int
    trained: int
    against_packing: str
    quantized: int = 0
    quantized_bytes: int = 0

    def state_bytes(self, dtype: torch.dtype) -> int:
        """What is kept of a trained parameter: fp32 master, gradient, two moments, and a copy to compute with; of a
        frozen one the copy alone, or its code.

        Activations come on top.
        """
        copy = 0 if dtype == torch.float32 else dtype.itemsize
        frozen = (self.parameters - self.trained - self.quantized) * dtype.itemsize
        return self.trained * (4 * 4 + copy) + frozen + self.quantized_bytes


def skeleton(base: Base, trainable: Trainable) -> tuple[PreTrainedModel, dict[str, slice]]:
    """The model as its config describes it, made without memory for its weights; of which parameters only rows are
    trained, and which.

    Raises InputError where `trainable` does not fit it.
    """
    config = base_config.read(base.path)
    with torch.device("meta"):
        # The attention is named so that a config.json cannot choose one, as in `load`.
        model = multimodal.auto_class(config).from_config(config, attn_implementation="eager", trust_remote_code=False)
        multimodal.freeze_all_but_text(model)
        rows = trainable.apply(model)
    return model, rows


def summarise(base: Base, trainable: Trainable) -> ModelSummary:
    """What its skeleton tells of the model. Raises InputError as that does."""
    model, rows = skeleton(base, trainable)
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    trained = sum((each[rows[name]] if name in rows else each).numel() for name, each in named.items())
    codes = sum(each.in_features * each.out_features for each in quantized.layers(model).values())
    return ModelSummary(quantized.size(model), trained, unpackable(model), codes, quantized.code_bytes(model))


def stop_ids(*holders: Any) -> tuple[int, ...]:
    """The token ids that end an answer, of the first of `holders` (generation config, config, tokenizer) that has any.

    >>> stop_ids(GenerationConfig(), GenerationConfig(eos_token_id=2)), stop_ids(GenerationConfig(eos_token_id=[5, 6]))
    ((2,), (5, 6))
    """
    found = next((ids for each in holders if (ids := getattr(each, "eos_token_id", None)) is not None), ())
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def _looks_like_a_path(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _left_alone(Path(path)).is_dir()


def _left_alone(folder: Path) -> Path:
    """Where a run that has no such final/ has left its virtual tokens."""
    return folder.with_name("adapter") if folder.name == "final" else folder


def _check_folder(folder: Path, needs_weights: bool) -> None:
    if not folder.is_dir():
        fix = "name a model folder or a hub id such as Qwen/Qwen2.5-0.5B"
        if _left_alone(folder).is_dir():
            fix = f"this run has left {_left_alone(folder)} alone"
        raise _refusal(str(folder), "there is no such folder", fix)
    if (folder / "final" / "config.json").is_file():
        raise _refusal(str(folder), "this is a run", f"its model is {folder / 'final'}")
    if (folder / "config.yaml").is_file() and (folder / "adapter").is_dir():
        raise _refusal(str(folder), "this is a run", f"what it has left is {folder / 'adapter'}")
    if (folder / "cursor.json").is_file() and folder.parent.name == "checkpoints":
        again = f"resume={folder.name} steps={int(folder.name.rpartition('-')[2])}"
        fix = f"{folder.parents[1]}/final is one; for one of this step move that away and train again with {again}"
        raise _refusal(str(folder), "this is a checkpoint of a run, not a model", fix)
    if is_adapter(folder):
        fix = "name one that it is merged into, as its run's final/ (deft train goes on with it; merge=true merges)"
        raise _refusal(str(folder), "this is an adapter, not a model", fix)
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(child.name for child in folder.iterdir())[:5]) or "nothing"
        what = f"not a model folder: it has no config.json, but {found}"
        raise _refusal(str(folder), what, "name the folder that has it")
    if needs_weights and not any(folder.glob("*.safetensors")):
        pickled = sorted(child.name for pattern in ("*.bin", "*.pt", "*.pth") for child in folder.glob(pattern))
        what = f"its weights are pickled ({pickled[0]}), and a pickle can run code" if pickled else "it has no weights"
        raise _refusal(str(folder), what, "save it with model.save_pretrained, which writes safetensors")


def _stop_ids(path: str, config: Any) -> tuple[int, ...]:
    try:
        found = stop_ids(GenerationConfig.from_pretrained(path))
    except OSError as error:
        if (base_config.folder(path) / "generation_config.json").is_file():
            raise _refusal(path, "its generation_config.json cannot be read", _AGAIN) from error
        found = stop_ids(config)
    if odd := [index for index in found if type(index) is not int or index < 0]:
        raise _refusal(
            path, f"eos_token_id {odd[0]!r} is no token id", "name tokens that end an answer, or take it out"
        )
    return found


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Whatever transformers objects to, as one line that says what to do."""
    try:
        yield
    except Exception as error:  # of a file of somebody else's: whatever it is, no bug of ours
        if hardware.is_out_of_memory(error) or isinstance(error, DeftError):
            raise
        raise _refusal(path, *_reason(str(error) or type(error).__name__)) from error


def _reason(message: str) -> tuple[str, str]:
    """What is wrong, and the fix, from a message of transformers 5."""
    if "trust_remote_code" in message or "custom code" in message:
        return "it brings its own code, which is not run", "use an architecture that is part of transformers"
    if "does not recognize this architecture" in message or "model_type" in message:
        return "its config.json names no architecture that this transformers knows", "upgrade transformers"
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no reason given")[:300]
    return f"it cannot be loaded: {first}", "check the name, or download or save the model again"


def _refusal(path: str, what: str, fix: str) -> InputError:
    return InputError(str(Problem(path, what, fix)))
