"""A Hugging Face folder or hub id -> a model. Nothing in it can run code: no pickle, no remote code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from deft.core import files, hardware
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
    marks          of its files, as they were when they were read
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
    marks: Mapping[str, tuple[int, int, int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it before training."""
        return tuple(f"{self.path}: {note}" for note in self._notes())

    def _notes(self) -> Iterator[str]:
        if self.left_over:
            count = f"{len(self.left_over)} weight{'s' if len(self.left_over) > 1 else ''}"
            what = f"have no place in {self.model_type} as its config.json describes it, {self.left_over[0]} first"
            yield f"{count} of its files {what}; not trained, carried over into final/ as they are"
        if len(self.dtypes) > 1:
            how = f"its weights lie in {' and '.join(self.dtypes)}; final/ has all of them in {self.dtype}, as most are"
            yield f"{how}, and export.dtype=fp32 keeps their bits"
        if past := [index for index in self.stop_ids if index >= self.vocab_size]:
            yield f"eos_token_id {past[0]} is past its vocabulary of {self.vocab_size}, and ends no answer"


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
        before = files.marks(base_config.folder(path))
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
        marks=before,
    )


def folder(base: Base) -> Path:
    """Where its files lie on this machine. Raises InputError where they have gone or changed since it was inspected."""
    with _explained(base.path):
        found = base_config.folder(base.path)
        now = files.marks(found)
    changed = sorted(name for name in base.marks.keys() | now.keys() if base.marks.get(name) != now.get(name))
    if base.marks and changed:
        fix = "put it back as it was, and run this again: it goes on from the last checkpoint"
        raise _refusal(str(found / changed[0]), "is another file than when the run began", fix)
    return found


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
    _refuse_broken(base.path, model.named_parameters())
    _refuse_empty(base.path, model)
    _refuse_half_tied(base.path, model)
    multimodal.freeze_all_but_text(model)
    return model.to(device).eval()


def without_weights(base: Base, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model as `load` makes it, in `dtype`, whose weights have no memory yet; its buffers are on the CPU.

    None where its files do not have each weight under its own name and in its own form, which transformers then makes
    of others: `StoredRows` cannot read it.
    """
    with _explained(base.path):
        model, _ = _plain(base.path, base_config.read(base.path), dtype=dtype, device_map="meta")
        rows = StoredRows(base)
    if model._weight_conversions or not all(rows.has_one(names) for names in shared_names(model)):
        return None
    for module in model.modules():
        if any(each.is_meta for each in module.buffers(recurse=False)):
            for name, each in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(each, device="cpu"))
            model._init_weights(module)
    if any(name in model.state_dict() for name, _ in model.named_buffers()):
        return None
    multimodal.freeze_all_but_text(model)
    found: PreTrainedModel = model.eval()
    return found


class StoredRows:
    """Rows of the weights in the files of a model, read one by one."""

    def __init__(self, base: Base) -> None:
        self._base, self._tensors = base, weight_files.stored(base_config.folder(base.path))

    def has_one(self, names: Iterable[str]) -> bool:
        """Whether a weight lies in the files under one of its names: two of them may differ."""
        return sum(name in self._tensors for name in names) == 1

    def read(self, names: Iterable[str], start: int, stop: int) -> Tensor:
        """[start, stop) of a weight. Raises InputError where one of its numbers is not finite."""
        name = next(name for name in names if name in self._tensors)
        with _explained(self._base.path), safe_open(self._tensors[name].file, "pt") as file:
            found: Tensor = file.get_slice(name)[start:stop]
        _refuse_broken(self._base.path, [(name, found)], start)
        return found


def shared_names(model: PreTrainedModel) -> list[list[str]]:
    """All names of each parameter, the first of which is what `named_parameters` calls it."""
    found: dict[int, list[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(each), []).append(name)
    return [*found.values()]


def has_all_wide(base: Base, model: PreTrainedModel) -> bool:
    """Whether `widen` finds all weights that lie in fp32 among others in bf16: experts are fused as they are loaded."""
    return _wide(base).keys() <= dict(model.named_parameters()).keys() | set(base.left_over)


@torch.no_grad()
def widen(base: Base, model: PreTrainedModel) -> None:
    """Gives a model that was loaded in bf16 the values of the weights that lie in fp32, in fp32, for their masters."""
    wide = _wide(base)
    for name, parameter in model.named_parameters():
        header = wide.get(name.replace(".base_layer.", "."))
        if header is not None and parameter.dtype == torch.bfloat16 and tuple(parameter.shape) == header.shape:
            with safe_open(header.file, "pt") as file:
                parameter.data = file.get_tensor(name.replace(".base_layer.", ".")).float().to(parameter.device)


def _wide(base: Base) -> dict[str, TensorHeader]:
    if base.dtype != "bfloat16" or len(base.dtypes) < 2:
        return {}
    stored = weight_files.stored(base_config.folder(base.path))
    return {name: each for name, each in stored.items() if each.dtype in ("F32", "F64")}


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
def _refuse_broken(path: str, weights: Iterable[tuple[str, Tensor]], first: int = 0) -> None:
    """Weights that are no numbers: no step could mend them, and no rate is to blame. `first` is the number of the first
    of their rows."""
    for name, parameter in weights:
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if not torch.stack(parameter.aminmax()).isfinite().all():
            broken = ~parameter.isfinite()
            row = first + int(broken.nonzero()[0][0])
            what = f"{name} has {int(broken.sum()):,} values that are not finite, in row {row} first"
            raise _refusal(path, what, "save the model again with numbers there, as in its other rows")


def _refuse_empty(path: str, model: PreTrainedModel) -> None:
    embeddings: Any = getattr(model.get_input_embeddings(), "weight", None)
    if embeddings is not None and not embeddings.any():
        what = "its embeddings are all 0, so that each token is read as any other"
        raise _refusal(path, what, "save the model again after its weights were loaded")


def _refuse_half_tied(path: str, model: PreTrainedModel) -> None:
    """A head of its own beside a config that ties it: transformers 5 takes the head, servers the config's word."""
    ends = [getattr(each, "weight", None) for each in (model.get_input_embeddings(), model.get_output_embeddings())]
    if getattr(model.config, "tie_word_embeddings", False) and None not in ends and ends[0] is not ends[1]:
        what = "its files have a head that is not its embeddings, and config.json ties the two"
        raise _refusal(path, what, "set tie_word_embeddings to false there, or take the head out of the files")


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

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
    if (odd := files.odd_entry(folder)) is not None:
        raise _refusal(str(odd), "is no file that can be read", "put the file in its place, or remove it")
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
        own = GenerationConfig.from_pretrained(path)
        found = stop_ids(own)
        _refuse_numbers_as_text(path, own)
    except OSError as error:
        if (base_config.folder(path) / "generation_config.json").is_file():
            raise _refusal(path, "its generation_config.json cannot be read", _AGAIN) from error
        found = stop_ids(config)
    if odd := [index for index in found if type(index) is not int or not 0 <= index < 2**31]:
        raise _refusal(
            path, f"eos_token_id {odd[0]!r} is no token id", "name tokens that end an answer, or take it out"
        )
    return found


def _refuse_numbers_as_text(path: str, own: GenerationConfig) -> None:
    """Text where generation computes with a number: transformers loads it, and ends when it generates."""
    for key, value in own.to_diff_dict().items():
        if isinstance(value, str) and key != "transformers_version" and _NUMBER.fullmatch(value.strip()):
            what = f"generation_config.json: {key} is the text {value!r}, and no number"
            raise _refusal(path, what, "take the quotes away there")


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
