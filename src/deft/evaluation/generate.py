"""Text from a model: a Hugging Face folder loaded as plain transformers loads it, prompts rendered as in training.

Prompts are strings, encoded as raw text (control tokens in them stay text, BOS where the tokenizer itself puts one), or
lists of messages, rendered by the tokenizer's chat template with its generation prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from deft.core import files, hardware
from deft.core.errors import InputError, Problem, Problems
from deft.core.registry import closest
from deft.encoding import tokenizer as tokenizers
from deft.encoding.render.sandbox import Meter, Sandbox
from deft.encoding.render.template import MISHAPS, Compiled
from deft.encoding.tokenizer import Tokenizer
from deft.model import load as models
from deft.model import virtual_tokens
from deft.model.causal_lm import evaluating

Messages: TypeAlias = Sequence[Mapping[str, Any]]

NEW_TOKENS = 256
"""Length of an answer where `generate` does not give `max_new_tokens`."""

BATCH_PROMPTS = 32

SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"})
"""Settings that have an effect only when sampling; any of them turns sampling on."""

_NUMBERS = SAMPLING | {"length_penalty", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "repetition_penalty"}

_REFUSED = {
    "max_length": "it would count the padding of a batch; use max_new_tokens",
    "min_length": "it would count the padding of a batch; use min_new_tokens",
    "num_return_sequences": "each prompt has one answer; give the prompt several times",
    "return_dict_in_generate": "answers are text",
    "stop_strings": "use stop_sequences",
    "pad_token_id": "the tokenizer's is used",
}
_ONE_ANSWER = {"return_dict_in_generate": False, "num_return_sequences": 1}
"""Whatever the model's own generation_config says."""
_SETTINGS = {name for name in vars(GenerationConfig()) if name[0] != "_" and name != "transformers_version"}


def load(path: str | Path, *, device: str = "auto") -> tuple[Any, Tokenizer]:
    """The model (dtype as saved, evaluation mode) and the tokenizer of a Hugging Face folder or hub id.

    Nothing in the folder can run code. `device`: auto (cuda, mps, cpu), or its name. A folder of virtual tokens stands
    for its base with them; others' `generate` does not put them in front.
    Raises DamagedError where deft wrote the folder and it is not as it was written, and InputError, with what to do,
    where there is no such folder or it is not a causal language model.
    """
    files.verify_model(Path(path).expanduser())
    settings = virtual_tokens.of_folder(Path(path).expanduser())
    base = models.inspect(settings[0] if settings else str(path))
    tokenizer = tokenizers.load(str(path))
    model = models.load(base, device=hardware.device(device), dtype=getattr(torch, base.dtype))
    if settings:
        virtual_tokens.attach(model, settings[1])
        virtual_tokens.fill(model, Path(path).expanduser())
    return model, tokenizer


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    generate: Mapping[str, Any],
    stop_sequences: Sequence[str] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """One answer per prompt, in order; `model` and `tokenizer` are left as they were found.

    `generate` holds transformers' generation settings; see `resolve` for defaults. An answer ends before the first stop
    token; special tokens are not shown. Where a stop sequence occurs, the answer is cut at the first one and its right
    end stripped (trlx). An answer has `max_new_tokens` or what the model's context leaves. Greedy answers do not depend
    on the other prompts, but for rounding.
    Raises InputError for settings that transformers refuses and prompts that do not fit the model's context.
    """
    if isinstance(prompts, str):
        raise InputError("prompts: a string is one prompt; give a list of them")
    request = Request.of(model, tokenizer, generate, stop_sequences, template_kwargs)
    rows = [request.prompt_ids(prompt) for prompt in prompts]
    lengths = [request.answer_length(row) for row in rows]
    answers = [""] * len(rows)
    with evaluating(model):
        for members in _batches(rows, lengths):
            found = request.generate([rows[index] for index in members], lengths[members[0]])
            for index, ids in zip(members, found, strict=True):
                answers[index] = cut(continuation(request.held, rows[index], ids), request.stops)
    return answers


def resolve(generate: Mapping[str, Any], new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Generation settings with deft's defaults: `new_tokens` tokens, greedy unless a sampling setting is given.

    Temperature 0 means greedy. What is not set comes from the model's own generation_config, as in transformers.
    Raises Problems that name every setting that is unknown (and the closest one), cannot be used here, or is no number.

    >>> resolve({"temperature": 0.7})
    {'max_new_tokens': 256, 'do_sample': True, 'temperature': 0.7}
    >>> resolve({"temperature": 0, "max_new_tokens": 8})
    {'max_new_tokens': 8, 'do_sample': False}
    """
    problems = [problem for key, value in generate.items() if (problem := _objection(key, value))]
    if problems:
        raise Problems("generate: these settings cannot be used", problems)
    chosen = {"max_new_tokens": new_tokens, "do_sample": bool(SAMPLING & generate.keys()), **generate}
    if chosen.get("temperature") == 0:
        del chosen["temperature"]
        chosen["do_sample"] = False
    return chosen


def check_stops(stop_sequences: Sequence[str]) -> tuple[str, ...]:
    """The stop sequences. Raises InputError unless they are a list of non-empty strings."""
    if isinstance(stop_sequences, str) or not all(isinstance(stop, str) and stop for stop in stop_sequences):
        raise InputError(f"stop_sequences: {stop_sequences!r} is not a list of non-empty strings")
    return tuple(stop_sequences)


def own_stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: those of the generation config, else of the config, else the tokenizer's EOS."""
    return models.stop_ids(model.generation_config, model.config.get_text_config(), tokenizers.wrap(tokenizer).hf)


def prompt_text(tokenizer: Any, prompt: str | Messages, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """What the model is shown for a prompt, as text: the string itself, or the rendered messages.

    template_kwargs  variables that the chat template gets

    Raises InputError where there is no chat template, or where it refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt
    held = tokenizers.wrap(tokenizer)
    if held.chat_template is None:
        raise InputError(
            "a prompt made of messages needs a chat template, and this tokenizer has none; give it as text"
        )
    given = {"tools": None, "documents": None, **held.template_tokens, **(template_kwargs or {})}
    try:
        messages = [dict(message) for message in prompt]
        template = Compiled(held.chat_template, Sandbox())
        return template.render(Meter(), {**given, "messages": messages, "add_generation_prompt": True})
    except MISHAPS as error:
        raise InputError(f"the chat template refuses this prompt: {error}; prompt: {prompt!r}") from error


def continuation(tokenizer: Any, before: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new` as it stands after `before`, special tokens left out.

    A sentencepiece tokenizer drops the space in front of a text's first word; here the first word is seldom the first.

        before  <s> ▁Once ▁upon      new  ▁a ▁time      ->  " a time", not "a time"
    """
    held = tokenizers.wrap(tokenizer)
    prefix, whole = _decode(held, before), _decode(held, [*before, *new])
    return whole[len(prefix) :] if whole.startswith(prefix) else _decode(held, new)


def cut(text: str, stop_sequences: Sequence[str]) -> str:
    """Text up to the first stop sequence, stripped on the right where one was found.

    >>> cut("Paris. \\n\\nQ: and", ["Q:", "\\n\\n"]), cut("Paris. ", ["Q:"])
    ('Paris.', 'Paris. ')
    """
    found = [position for position in map(text.find, stop_sequences) if position >= 0]
    return text[: min(found)].rstrip() if found else text


def ids_of(prompt: str | Messages, held: Tokenizer, template_kwargs: Mapping[str, Any], size: int) -> list[int]:
    """The ids of a prompt, for a model of `size` embeddings.

    Raises InputError where it is empty and the tokenizer has no token to start from, or a token is not the model's.
    """
    if isinstance(prompt, str):
        ids = (held.start_ids if held.puts_bos else []) + held.literal(prompt, continues=False)
    else:
        ids = held.ids(prompt_text(held, prompt, template_kwargs))
    if odd := next((index for index in ids if index >= size), None):
        what = f"{held.hf.convert_ids_to_tokens(odd)!r} is token {odd}, and the model has {size} embeddings"
        raise InputError(f"prompt: {what}; use the tokenizer that belongs to the model")
    if ids or held.start_ids:
        return ids or held.start_ids
    raise InputError("an empty prompt needs a BOS or EOS token to start from, and this tokenizer has neither")


@dataclass(frozen=True, slots=True)
class Request:
    """One call's model and checked settings.

    settings         what `generate` of transformers takes, without the length
    template_kwargs  variables that the chat template gets
    """

    model: Any
    held: Tokenizer
    settings: Mapping[str, Any]
    new_tokens: int
    stops: tuple[str, ...]
    template_kwargs: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        generate: Mapping[str, Any],
        stop_sequences: Sequence[str],
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Request:
        held = tokenizers.wrap(tokenizer)
        chosen = resolve(generate)
        new_tokens = chosen.pop("max_new_tokens")
        given = GenerationConfig(eos_token_id=chosen.pop("eos_token_id", None))
        stop_ids = models.stop_ids(given) or own_stop_ids(model, held)
        pad = next(index for index in (held.hf.pad_token_id, held.hf.eos_token_id, *stop_ids, 0) if index is not None)
        settings = {"use_cache": True, **chosen, "eos_token_id": list(stop_ids) or None, "pad_token_id": pad}
        return cls(model, held, settings, new_tokens, check_stops(stop_sequences), dict(template_kwargs or {}))

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        """The ids of a prompt. Raises InputError as `ids_of` does."""
        return ids_of(prompt, self.held, self.template_kwargs, self.model.config.get_text_config().vocab_size)

    def answer_length(self, row: Sequence[int]) -> int:
        """Most tokens of an answer to `row`. Raises InputError where the prompt alone fills the context."""
        # Models without positions of a fixed number (Bloom, Mamba) have no such field.
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return self.new_tokens
        context -= virtual_tokens.count(self.model)
        if len(row) >= context:
            raise InputError(f"a prompt of {len(row)} tokens leaves no room in a context of {context}; shorten it")
        return min(self.new_tokens, context - len(row))

    def generate(
        self, rows: Sequence[list[int]], new_tokens: int, streamer: BaseStreamer | None = None
    ) -> list[list[int]]:
        """The new ids of each row before its first stop token, by transformers' generate on left-padded rows.

        Raises InputError where transformers refuses the settings.
        """
        virtual, pad, device = virtual_tokens.count(self.model), self.settings["pad_token_id"], self.model.device
        width = virtual + max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        masks = ([1] * virtual + [0] * (width - virtual - len(row)) + [1] * len(row) for row in rows)
        mask = torch.tensor([*masks], device=device)
        criteria = StoppingCriteriaList([_StopSequences(self, width)] if self.stops else [])
        # max_length, not max_new_tokens: transformers warns at each call when a generation_config has a max_length.
        lengths = {"max_length": width + new_tokens, "max_new_tokens": None}
        given = {**_ONE_ANSWER, **self.settings, **lengths, "streamer": streamer, "stopping_criteria": criteria}
        if self.model.generation_config.stop_strings:
            given["tokenizer"] = self.held.hf
        if streamer is not None:
            given["num_beams"] = 1
        given |= virtual_tokens.generated_from(self.model, len(rows) * (given.get("num_beams") or 1))
        try:
            found = self.model.generate(input_ids=ids, attention_mask=mask, **given)
        except ValueError as error:
            raise InputError(f"generate: {error}") from error
        return [self.before_stop(row[width:]) for row in found.tolist()]

    def before_stop(self, ids: list[int]) -> list[int]:
        """The ids before the first stop token."""
        stop_ids = self.settings["eos_token_id"] or ()
        return next((ids[:position] for position, token in enumerate(ids) if token in stop_ids), ids)


def _objection(key: str, value: Any) -> Problem | None:
    """What is wrong with a setting, by its name and kind; its range is transformers' to check."""
    where = f"generate.{key}"
    if key in _REFUSED:
        return Problem(where, "cannot be used here", _REFUSED[key])
    if key not in _SETTINGS:
        return Problem(where, "is not a generation setting of transformers", closest(key, _SETTINGS - _REFUSED.keys()))
    if key == "max_new_tokens" and (not isinstance(value, int) or value < 1):
        return Problem(where, f"{value!r} is not a whole number above 0")
    if key in _NUMBERS and not isinstance(value, int | float | None):
        return Problem(where, f"{value!r} is not a number")
    return None


def _batches(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows that are generated together: same length of answer, similar length of prompt."""
    order = sorted(range(len(rows)), key=lambda index: (lengths[index], len(rows[index])))
    for _, group in groupby(order, key=lengths.__getitem__):
        members = list(group)
        yield from (members[i : i + BATCH_PROMPTS] for i in range(0, len(members), BATCH_PROMPTS))


def _decode(held: Tokenizer, ids: Sequence[int]) -> str:
    return str(held.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _StopSequences(StoppingCriteria):
    """Ends a row once its answer holds a stop sequence.

    transformers' StopStringCriteria also ends a row where prompt and answer make a stop sequence together.
    """

    def __init__(self, request: Request, width: int) -> None:
        self.request, self.width = request, width
        # A character has at most four bytes, a token at least one; the rest is for tokens that are not shown.
        self.tail = 4 * max(map(len, request.stops)) + 8

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = [_decode(self.request.held, row[-self.tail :]) for row in input_ids[:, self.width :].tolist()]
        done = [any(stop in text for stop in self.request.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)
