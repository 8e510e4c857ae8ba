"""The hand-off: an ordinary Hugging Face folder, written whole or not at all, reloaded by plain transformers, compared.

final/  config.json  generation_config.json  model*.safetensors  tokenizer files  README.md  deft.json  manifest.json
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from deft.core import files, hardware
from deft.core.errors import DiskError
from deft.core.files import Staging
from deft.core.types import Conversation
from deft.encoding import tokenizer as tokenizers
from deft.encoding.rows import Example, as_chat
from deft.encoding.tokenizer import Tokenizer
from deft.evaluation import prompt_form
from deft.evaluation.generate import SAMPLING, own_stop_ids
from deft.evaluation.prompt_form import PromptForm
from deft.export import carried
from deft.export.weights import ExportError, FinalWeights, Shared, described_difference, difference, same_bits, write
from deft.model import multimodal
from deft.model.causal_lm import evaluating
from deft.model.load import Base, positions_move
from deft.model.load import folder as folder_of
from deft.model.load import stop_ids as stop_ids_of

TOLERANCE = 1e-4
"""Largest ||a - b|| / ||b|| of a row's logits, the exported weights run through both models in fp32."""

SERVED_TOLERANCE = 0.5
"""The same with each model as it is: rounding to bf16 costs 0.01, or 0.1 where it chooses other experts."""

FITS = 0.25
"""Share of the machine's memory that a model which ranks share out may take to be loaded whole at the end."""

WHOLE = Shared()
"""A model that is whole on the rank that exports it."""

VANISHING = 1e-4
"""The share of a tensor's values that may become 0 by rounding before it is told."""

NAMED = 5
"""How many of such tensors are told by name."""

EXPORT_ROWS = 3
"""How many training examples are compared between the model in memory and the exported one."""

TEXTS = (
    "Hello, world!",
    "  two spaces,\ta tab\nand a line",
    "Žofie née 東京 🙂 12,345.67",
    "def f(x):\n    return x ** 2\n",
)
"""What the saved tokenizer must encode as the one in memory does, beside the texts of the rows compared."""


@dataclass(frozen=True, slots=True)
class ExportCheck:
    """What `verify` compared; errors are ||a - b|| / ||b|| of the worst row's logits.

    largest_error  the exported weights, in fp32, through the exported model and the one in memory: at most `TOLERANCE`
    served_error   the exported model as it is served against the one in memory as it is: what rounding to `dtype` costs
    vanished       how many of a tensor's values became 0 by the rounding, and how many it has, by name

    Of a model that ranks share out there is no served_error, and no largest_error where it is too large for rank 0.
    """

    tensors: int
    parameters: int
    dtype: str
    rows: int
    largest_error: float | None
    served_error: float | None
    texts: int
    template_compared: bool
    stop_ids: tuple[int, ...]
    vanished: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def warning(self) -> str:
        """Which tensors lost more to 0 than the few values that any rounding takes; empty where none did.

        >>> ExportCheck(2, 9, "float16", 1, 0.0, 0.0, 4, True, (), {"up": (3, 4), "down": (1, 90_000)}).warning
        'warning: values that are 0 in float16: 3 of 4 of up; export.dtype=fp32 keeps them'
        """
        shares = {name: count / every for name, (count, every) in self.vanished.items() if count > VANISHING * every}
        worst = sorted(shares, key=lambda name: -shares[name])
        told = [f"{self.vanished[name][0]:,} of {self.vanished[name][1]:,} of {name}" for name in worst[:NAMED]]
        told += [f"some of {len(worst) - NAMED} more tensors"] if len(worst) > NAMED else []
        what = f"warning: values that are 0 in {self.dtype}: {', '.join(told)}; export.dtype=fp32 keeps them"
        return what if told else ""

    def __str__(self) -> str:
        if self.served_error is None:
            logits = "not compared, as it is too large to be loaded whole"
            if self.largest_error is not None:
                logits = f"by the settings in memory within {self.largest_error:.1e}"
            rows = f"{self.tensors} tensors equal each rank's rows"
            return f"{self.dtype}, {rows}, {self.texts} texts encoded alike; logits {logits}"
        return (
            f"{self.dtype}, reloaded by plain transformers and compared: {self.tensors} tensors equal, "
            f"logits within {self.largest_error:.1e} ({self.served_error:.1e} with each in its own dtype), "
            f"{self.texts} texts encoded alike"
        )


def export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    stop_ids: Sequence[int],
    chat_template: str | None,
    card: str,
    weights: Mapping[str, Tensor] | None,
    form: PromptForm | None = None,
    base: Path | None = None,
    left_over: Collection[str] = (),
    about: Mapping[str, Any] | None = None,
    shared: Shared = WHOLE,
) -> None:
    """Write model and tokenizer as `folder`, which appears complete or not at all; neither object is changed.

    weights        fp32 masters by parameter name, whole tensors on any device; other parameters are the model's own
    stop_ids       what ends an answer beside the model's own stop ids, for generation_config.json
    chat_template  stands in for the tokenizer's own where given
    card           README.md
    form           how it is asked, for deft.json
    base           the folder of the model that was trained: what training has not changed is carried over from it
    left_over      weights of its files that are not the model's, which are carried over too
    about          what manifest.json says of it
    shared         where ranks share the model out: the others call `write` of weights.py

    Raises InputError if `folder` exists, DiskError with the path if it cannot be written. A kill leaves a hidden
    staging folder beside it, which `files.sweep` removes.
    """
    with _complaining(folder), files.staged(folder, about) as staging:
        generation = _generation_config(model, tokenizer, stop_ids)
        twin = empty_twin(model, dtype)
        _write_configs(twin, staging, generation)
        write(staging, FinalWeights(model, dtype, weights, shared), twin)
        _write_tokenizer(_tokenizer_to_save(tokenizer, chat_template), staging, base)
        if base is not None:
            carried.replace_configs(staging, base, generation)
            carried.copy_others(staging, base)
            carried.copy_weights(staging, base, left_over)
        staging.write_text("README.md", card)
        if form is not None:
            staging.write_text(prompt_form.FILE, form.as_json())


def hand_over(
    folder: Path,
    model: Any,
    tokenizer: Tokenizer,
    *,
    base: Base,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor] | None,
    marks: Collection[str],
    card: str,
    form: PromptForm,
    examples: Sequence[Example],
    chat: Conversation | None,
    about: Mapping[str, Any] | None = None,
    shared: Shared = WHOLE,
) -> ExportCheck:
    """Export a trained model unless an earlier start has, and compare it; it is set aside where it differs.

    Of a model that ranks share out all of them have to call it.

    base      what training has not changed is carried over from it
    marks     what ends the learnt turns of chats
    form      how it is asked
    examples  trained ones, the first `EXPORT_ROWS` of which are compared
    chat      the conversation that templates are compared on
    about     what its manifest.json says of it
    """
    stops, world = _learnt_stop_ids(tokenizer, marks), shared.owners.world
    source = FinalWeights(model, dtype, weights, shared)
    if not world.from_first("whether it is exported", folder.exists):
        _export(folder, source, tokenizer, base, stop_ids=stops, card=card, form=form, about=about)
        world.from_first("that it is exported", lambda: True)
    rows = [example[0].tokens.tolist() for example in examples[:EXPORT_ROWS]]
    messages = [{"role": each.role, "content": each.content} for each in as_chat(chat.messages)] if chat else None
    try:
        if shared.owners.rows:
            return verify_shared(folder, source, tokenizer.hf, rows, messages, stops)
        return verify(folder, model, tokenizer.hf, rows, messages, weights=weights, stop_ids=stops)
    except ExportError:
        if world.is_first:
            files.set_aside(folder)
        raise


def _export(folder: Path, weights: FinalWeights, tokenizer: Tokenizer, base: Base, **options: Any) -> None:
    """`export` on rank 0; the others send what they hold."""
    if not weights.shared.owners.world.is_first:
        write(None, weights, empty_twin(weights.model, weights.dtype))
        return
    export(
        weights.model,
        tokenizer.hf,
        folder,
        dtype=weights.dtype,
        chat_template=None,
        weights=weights.masters,
        base=folder_of(base),
        left_over=base.left_over,
        shared=weights.shared,
        **options,
    )


def _learnt_stop_ids(tokenizer: Tokenizer, marks: Collection[str]) -> list[int]:
    """The ids of the marks, as far as they are single tokens; EOS where there are none, as text was learnt."""
    ids = [tokenizer.special_tokens[mark] for mark in sorted(marks) if mark in tokenizer.special_tokens]
    return ids if marks or tokenizer.eos_id is None else [tokenizer.eos_id]


def verify(
    folder: Path,
    model: Any,
    tokenizer: Any,
    token_rows: Sequence[Sequence[int]],
    messages: Sequence[Mapping[str, Any]] | None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    stop_ids: Sequence[int] = (),
    chat_template: str | None = None,
) -> ExportCheck:
    """Reload `folder` with plain transformers and compare it with the model in memory; arguments as of `export`.

    Every parameter has the bits that were to be written, tied ones are tied, and `weights` are the model's to its
    rounding; with equal weights both models give the same logits for each row (run alone); the tokenizer gives the same
    ids, the template the same text for `messages`; the stop ids are there. On the model's device it takes the room of
    the exported weights in fp32.
    Raises ExportError that names the first difference.
    """
    reloaded = _reload(folder).to(model.device)
    dtype = str(reloaded.dtype).removeprefix("torch.")
    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    texts = _compare_tokenizers(tokenizers.wrap(tokenizer).hf, saved, token_rows)
    compared = _compare_templates(_tokenizer_to_save(tokenizer, chat_template), saved, messages)
    stops = _compare_stop_ids(model, tokenizer, reloaded.generation_config, stop_ids)
    tensors, parameters, vanished = _compare_weights(model, reloaded, weights)
    _compare_buffers(model, reloaded)
    served = [_served_error(model, reloaded, row) for row in token_rows]
    exact = reloaded.float()
    errors = [_comparelogits(model, exact, row, index) for index, row in enumerate(token_rows)]
    largest, rounding = max(errors, default=0.0), max(served, default=0.0)
    if not rounding <= SERVED_TOLERANCE:
        raise ExportError(f"in {dtype} the exported model's logits differ by {rounding:.2e} from those in memory")
    return ExportCheck(tensors, parameters, dtype, len(errors), largest, rounding, texts, compared, stops, vanished)


@contextmanager
def _complaining(folder: Path) -> Iterator[None]:
    """Turns disk errors of transformers and its libraries into DiskError."""
    try:
        yield
    except Exception as error:
        if _is_disk_error(error):
            raise DiskError(f"{folder}: cannot be written ({error})") from error
        raise


def _is_disk_error(error: BaseException) -> bool:
    """safetensors wraps the system's error in its own; tokenizers raises a bare Exception with the system's words."""
    return isinstance(error, SafetensorError) or (type(error) is Exception and "os error" in str(error))


def _write_configs(twin: Any, staging: Staging, generation_config: GenerationConfig) -> None:
    """config.json and generation_config.json, as save_pretrained writes them."""
    twin.config.architectures = [type(twin).__name__]
    twin.config.save_pretrained(staging.path)
    (staging.path / GENERATION_CONFIG_NAME).write_bytes(carried.as_json(generation_config.to_diff_dict()))


def _write_tokenizer(tokenizer: Any, staging: Staging, base: Path | None) -> None:
    """The base's files where the tokenizer is the base's, but for its template."""
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    own: Any = None if base is None else AutoTokenizer.from_pretrained(base, **options)
    if base is None or not _is_same_tokenizer(tokenizer, own):
        carried.write_tokenizer(tokenizer, staging.path)
        return
    has_changed = tokenizer.chat_template != own.chat_template
    carried.copy_tokenizer(staging, base, tokenizer.chat_template if has_changed else None)


def _is_same_tokenizer(one: Any, other: Any) -> bool:
    """But for templates, truncation and padding."""
    pair = [_tokenizer_to_save(each, None) for each in (one, other)]
    parts = [(each.backend_tokenizer.to_str(), each.special_tokens_map) for each in pair]
    return parts[0] == parts[1]


def empty_twin(model: Any, dtype: torch.dtype) -> Any:
    """The model's class without weights, with its config as it is to be saved: nothing of training in it."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = None
    for part in (config, config.get_text_config()):
        part.dtype = dtype
        if hasattr(part, "use_cache"):
            part.use_cache = True
    with torch.device("meta"):
        twin = _own_class(model)(config).to(dtype)
    # How the base's file was read (experts fused, names changed), so that it is written back in the same form.
    twin._weight_conversions = getattr(model, "_weight_conversions", None)
    return twin


def _own_class(model: Any) -> Any:
    """The model's class without what FSDP2 puts before it."""
    return next(each for each in type(model).__mro__ if not each.__name__.startswith("FSDP"))


def _generation_config(model: Any, tokenizer: Any, stop_ids: Sequence[int]) -> GenerationConfig:
    """The model's own, with its stop ids and ours, a pad token, and without what transformers refuses to save."""
    config = copy.deepcopy(model.generation_config)
    eos = list(dict.fromkeys([*own_stop_ids(model, tokenizer), *stop_ids]))
    config.eos_token_id = eos[0] if len(eos) == 1 else eos or None
    pad = tokenizers.wrap(tokenizer).hf.pad_token_id
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = pad if pad is not None else (eos[0] if eos else None)
    # Of training, not of serving.
    config.use_cache = True
    for flag in _idle_flags(config):
        setattr(config, flag, None)
    return config


def _idle_flags(config: GenerationConfig) -> Iterator[str]:
    """Settings without effect beside the others. Published configs have them, yet transformers refuses to save them."""
    if config.do_sample is not True:
        yield from sorted(flag for flag in SAMPLING if hasattr(config, flag))
    if config.num_beams in (None, 1):
        yield from ("early_stopping", "length_penalty")
    if config.return_dict_in_generate is not True:
        yield from config.extra_output_flags


def _tokenizer_to_save(tokenizer: Any, chat_template: str | None) -> Any:
    """A copy with the template, and without the truncation and padding that the last call left in its backend."""
    saved = copy.deepcopy(tokenizers.wrap(tokenizer).hf)
    saved.backend_tokenizer.no_truncation()
    saved.backend_tokenizer.no_padding()
    if chat_template is not None:
        saved.chat_template = chat_template
    return saved


def verify_shared(
    folder: Path,
    weights: FinalWeights,
    tokenizer: Any,
    token_rows: Sequence[Sequence[int]],
    messages: Sequence[Mapping[str, Any]] | None,
    stop_ids: Sequence[int],
) -> ExportCheck:
    """`verify` on all ranks of a model that no rank has whole.

    Each compares its own rows of every tensor with the files. Rank 0 loads it with plain transformers where its weights
    in fp32 take less than `FITS` of the memory: logits are those that a model with the settings in memory has by them.
    """
    model, twin = weights.model, empty_twin(weights.model, weights.dtype)
    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    texts = _compare_tokenizers(tokenizers.wrap(tokenizer).hf, saved, token_rows)
    compared = _compare_templates(_tokenizer_to_save(tokenizer, None), saved, messages)
    stops = _compare_stop_ids(model, tokenizer, GenerationConfig.from_pretrained(folder), stop_ids)
    world = weights.shared.owners.world
    if complaint := world.first_complaint(difference(folder, weights, twin)):
        raise ExportError(complaint)
    sizes = [weights.like()[names[0]].numel() for names in weights.ties()]
    largest = None
    if world.is_first and 6 * sum(sizes) < FITS * hardware.memory_bytes(torch.device("cpu")):
        reloaded = _reload(folder)
        _compare_buffers(model, reloaded)
        exact = reloaded.float()
        errors = [_comparelogits(twin, exact, row, index) for index, row in enumerate(token_rows)]
        largest = max(errors, default=0.0)
    dtype = str(weights.dtype).removeprefix("torch.")
    return ExportCheck(len(sizes), sum(sizes), dtype, len(token_rows), largest, None, texts, compared, stops)


def _reload(folder: Path) -> Any:
    options = {"trust_remote_code": False, "local_files_only": True, "output_loading_info": True}
    try:
        plain = multimodal.auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        reloaded, loading = cast(tuple[Any, dict[str, Any]], plain.from_pretrained(folder, **options))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"{folder}: plain transformers cannot load it ({error})") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise ExportError(f"{folder}: {kind.replace('_', ' ')} on loading: {sorted(loading[kind])[:3]}")
    return reloaded.eval()


def _compare_weights(
    model: Any, reloaded: Any, weights: Mapping[str, Tensor] | None
) -> tuple[int, int, dict[str, tuple[int, int]]]:
    """Numbers of tensors and parameters, all equal to the bit and tied alike, and what of them `vanished`."""
    found = dict(reloaded.named_parameters(remove_duplicate=False))
    tensors = parameters = 0
    written = FinalWeights(model, reloaded.dtype, weights)
    lost: dict[str, tuple[int, int]] = {}
    for names in written.ties():
        tensor, vanished = written.part(names).cpu(), written.vanished(names)
        _check_masters(names, model, weights)
        for name in names:
            if name not in found:
                raise ExportError(f"{name}: not in the exported model")
            if not same_bits(tensor, found[name].detach().cpu()):
                raise ExportError(f"{name}: {described_difference(tensor, found[name].detach().cpu())}")
        if len({id(found[name]) for name in names}) > 1:
            raise ExportError(f"{' and '.join(names)}: tied in memory, but not in the exported model")
        tensors, parameters = tensors + 1, parameters + tensor.numel()
        lost |= {names[0]: (vanished, tensor.numel())} if vanished else {}
    if tensors != len({id(parameter) for parameter in found.values()}):
        raise ExportError("the exported model has parameters that the model in memory has not")
    return tensors, parameters, lost


def _check_masters(names: Sequence[str], model: Any, weights: Mapping[str, Tensor] | None) -> None:
    """Raises ExportError where a master is not what the model's own parameter is rounded from."""
    name = next((name for name in names if weights is not None and name in weights), None)
    if weights is None or name is None:
        return
    own, master = model.get_parameter(name).detach(), weights[name].detach().to(model.device)
    if not own.is_floating_point():
        return
    bounds = torch.finfo(own.dtype)
    far = (own.float() - master.float()).abs() > bounds.eps * master.float().abs() + bounds.tiny
    if far.any():
        raise ExportError(f"{name}: {int(far.sum())} of {far.numel()} masters are not the model's own weights")


def _compare_buffers(model: Any, reloaded: Any) -> None:
    """Saved buffers, and those that each load makes anew: `model.to(bfloat16)` rounds the rotary frequencies of the
    model in memory, whose positions are then not those of the model that is served."""
    found = dict(reloaded.named_buffers())
    saved = {name for name, _ in FinalWeights(model, reloaded.dtype).buffers()}
    for name, buffer in model.named_buffers():
        if name not in saved and positions_move(model.config):
            continue
        if name not in found or not _same_values(
            buffer.detach().cpu(), found[name].detach().cpu(), exact=name in saved
        ):
            raise ExportError(f"{name}: the buffer of the exported model differs from the one in memory")


def _same_values(mine: Tensor, theirs: Tensor, exact: bool) -> bool:
    """What is computed anew may differ in its last bits between devices; rounded to bf16 it differs by 1e-3."""
    mine = mine.to(theirs.dtype)
    if mine.shape != theirs.shape or exact or not mine.is_floating_point():
        return torch.equal(mine, theirs)
    return torch.allclose(mine, theirs, rtol=1e-5, atol=0.0)


def _served_error(model: Any, reloaded: Any, row: Sequence[int]) -> float:
    return relative(logits(reloaded, row), logits(model, row))


def _comparelogits(model: Any, exact: Any, row: Sequence[int], index: int) -> float:
    """The row's error where both models run on the exported weights in fp32.

    With each model's own weights, the rounding to the saved dtype would hide a wrong setting: experts chosen otherwise
    alone made 8e-2 of a mixture of experts in bf16.
    """
    same = dict(exact.named_parameters(remove_duplicate=False)) | dict(exact.named_buffers())
    error = relative(logits(exact, row), logits(model, row, same))
    # `not <=`, so that a NaN is a difference.
    if not error <= TOLERANCE:
        raise ExportError(f"row {index}: the exported model's logits differ by {error:.2e} (allowed: {TOLERANCE:.0e})")
    return error


@torch.no_grad()
def logits(model: Any, row: Sequence[int], weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """fp32 [T, V]: a row alone through the model, with other weights and buffers in place of its own where given."""
    device = model.device if weights is None else next(iter(weights.values())).device
    inputs = {"input_ids": torch.tensor([list(row)], device=device), "use_cache": False}
    with evaluating(model):
        out = model(**inputs) if weights is None else functional_call(model, dict(weights), (), inputs)
    return out.logits[0].float()


def relative(found: Tensor, meant: Tensor) -> float:
    """
    >>> relative(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0])), relative(torch.zeros(2), torch.zeros(2))
    (0.5, 0.0)
    """
    return float((found - meant).norm() / meant.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _compare_tokenizers(mine: Any, saved: Any, token_rows: Sequence[Sequence[int]]) -> int:
    texts = [*TEXTS, *(mine.decode(list(row)) for row in token_rows)]
    for text in texts:
        if list(mine(text)["input_ids"]) != list(saved(text)["input_ids"]):
            raise ExportError(f"the exported tokenizer gives other ids for {text[:80]!r}")
    return len(texts)


def _compare_templates(mine: Any, saved: Any, messages: Sequence[Mapping[str, Any]] | None) -> bool:
    if mine.chat_template != saved.chat_template:
        raise ExportError("the exported tokenizer has another chat template")
    if messages is None or mine.chat_template is None:
        return False
    for prompt in (False, True):
        if _rendered(mine, messages, prompt) != _rendered(saved, messages, prompt):
            raise ExportError("the exported chat template renders another text")
    return True


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
        )
    except (TemplateError, TypeError, ValueError) as error:
        # A template that refuses these messages, or needs variables that only the run gave it, does so in both.
        return f"refused: {error}"


def _compare_stop_ids(model: Any, tokenizer: Any, config: GenerationConfig, stop_ids: Sequence[int]) -> tuple[int, ...]:
    found = stop_ids_of(config)
    missing = [index for index in (*own_stop_ids(model, tokenizer), *stop_ids) if index not in found]
    if missing:
        raise ExportError(f"generation_config.json: the stop ids {missing} are not in eos_token_id {list(found)}")
    return found
