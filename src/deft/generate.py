"""Text from a model: a Hugging Face folder loaded as plain transformers loads it, prompts rendered as in training.

Prompts are strings, encoded as raw text (control tokens in them stay text, BOS where the tokenizer itself puts one), or
lists of messages, rendered by the tokenizer's chat template with its generation prompt.
"""

from __future__ import annotations

import difflib
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from jinja2 import TemplateError
from rich.console import Console
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from deft import hardware
from deft import tokenizer as tokenizers
from deft.errors import InputError, Problem, Problems
from deft.model import load as models
from deft.tokenizer import Tokenizer

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Render: TypeAlias = Literal["auto", "raw", "chat"]

NEW_TOKENS = 256
"""Length of an answer where `generate` does not give `max_new_tokens`."""

BATCH_PROMPTS = 32

SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"})
"""Settings that mean something only when sampling; any of them turns sampling on."""

_NUMBERS = SAMPLING | {"length_penalty", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "repetition_penalty"}

_REFUSED = {
    "max_length": "it would count the padding of a batch; use max_new_tokens",
    "min_length": "it would count the padding of a batch; use min_new_tokens",
    "num_return_sequences": "each prompt has one answer; give the prompt several times",
    "return_dict_in_generate": "answers are text",
    "stop_strings": "use stop_sequences",
    "pad_token_id": "the tokenizer's is used",
}


def load(path: str | Path, *, device: str = "auto") -> tuple[Any, Tokenizer]:
    """The model (dtype as saved, evaluation mode) and the tokenizer of a Hugging Face folder or hub id.

    Nothing in the folder can run code. `device`: auto (cuda, mps, cpu), or its name.
    Raises InputError, with what to do, where there is no such folder or it is not a causal language model.
    """
    base = models.inspect(str(path))
    tokenizer = tokenizers.load(str(path))
    return models.load(base, device=hardware.device(device), dtype=getattr(torch, base.dtype)), tokenizer


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    generate: Mapping[str, Any],
    stop_sequences: Sequence[str] = (),
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
    held = tokenizers.wrap(tokenizer)
    settings = _settings(model, held, generate, stop_sequences)
    rows = [_prompt_ids(held, prompt) for prompt in prompts]
    rooms = [_room(model, len(row), settings.new_tokens) for row in rows]
    answers = [""] * len(rows)
    with evaluation_mode(model):
        for members in _batches(rows, rooms):
            batch = [rows[index] for index in members]
            for index, row, new in zip(
                members, batch, _new_ids(model, held, batch, rooms[members[0]], settings), strict=True
            ):
                answers[index] = cut(continuation(held, row, new), settings.stops)
    return answers


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str | Messages,
    *,
    generate: Mapping[str, Any],
    stop_sequences: Sequence[str] = (),
) -> Iterator[str]:
    """The pieces of one answer as they come; joined, they are what `complete` gives for the prompt.

    Errors of `complete` are raised at once; what fails while the model writes is raised from the iterator. Closing the
    iterator stops the model.
    """
    held = tokenizers.wrap(tokenizer)
    settings = _settings(model, held, generate, stop_sequences)
    if settings.transformers.get("num_beams", 1) != 1:
        raise InputError("generate.num_beams: beams cannot be streamed; leave it out, or do not stream")
    row = _prompt_ids(held, prompt)
    room = _room(model, len(row), settings.new_tokens)
    return _until_stop(_pieces(held, row, _live_ids(model, held, row, room, settings)), settings.stops)


def chat(
    model: Any,
    tokenizer: Any,
    lines: Iterable[str],
    write: Callable[[str], None],
    *,
    system: str | None = None,
    generate: Mapping[str, Any],
) -> None:
    """A conversation: each line is the user's next message, each answer is written piece by piece.

    The history goes through the chat template. `/reset` forgets it, `/quit` or the end of the lines ends. A message
    that does not fit the context, and an answer that Ctrl-C stops, are left out of the history.
    Raises InputError where the tokenizer has no chat template.
    """
    held = tokenizers.wrap(tokenizer)
    if held.chat_template is None:
        raise InputError("this model has no chat template, so it cannot chat; use `deft generate`")
    start = [{"role": "system", "content": system}] if system else []
    history = start
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            history = start
        elif text:
            history = _turn(model, held, [*history, {"role": "user", "content": text}], write, generate)


def run_generate(
    model_path: str | Path,
    prompts: Sequence[str],
    render: Render = "auto",
    generate: Mapping[str, Any] | None = None,
    stop_sequences: Sequence[str] = (),
    stream: bool = False,
) -> list[str]:
    """`deft generate`: writes the answers to standard output and returns them.

    `render`: chat puts each prompt into the chat template as the user's message, raw does not, auto is chat where the
    tokenizer has a template. Several answers stand under a line with their prompt.
    """
    settings = generate or {}
    resolve(settings)
    check_stops(stop_sequences)
    if render not in get_args(Render):
        raise InputError(f"render: {render!r} is not one of auto, raw, chat")
    model, tokenizer = load(model_path)
    rendered = [_render(tokenizer, prompt, render) for prompt in prompts]
    if not stream:
        answers = complete(model, tokenizer, rendered, generate=settings, stop_sequences=stop_sequences)
        for prompt, answer in zip(prompts, answers, strict=True):
            _write(_heading(prompt, len(prompts)) + answer + "\n")
        return answers
    return [
        _stream_one(model, tokenizer, text, _heading(prompt, len(prompts)), settings, stop_sequences)
        for prompt, text in zip(prompts, rendered, strict=True)
    ]


def run_chat(model_path: str | Path, system: str | None = None, generate: Mapping[str, Any] | None = None) -> None:
    """`deft chat`: a prompt on a terminal, plain lines from a pipe; the end of the input ends it."""
    settings = generate or {}
    resolve(settings)
    model, tokenizer = load(model_path)
    chat(model, tokenizer, _typed_lines(), _write, system=system, generate=settings)


def resolve(generate: Mapping[str, Any], new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Generation settings with deft's defaults: `new_tokens` tokens, greedy unless a sampling setting is given.

    Temperature 0 means greedy. What is not set comes from the model's own generation_config, as in transformers.
    Raises Problems that name every setting that is unknown (and the closest one), cannot be used here, or is no number.

    >>> resolve({"temperature": 0.7})
    {'max_new_tokens': 256, 'do_sample': True, 'temperature': 0.7}
    >>> resolve({"temperature": 0, "max_new_tokens": 8})
    {'max_new_tokens': 8, 'do_sample': False}
    """
    problems = [problem for key, value in generate.items() for problem in _objections(key, value)]
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
    hf = tokenizers.wrap(tokenizer).hf
    for value in (model.generation_config.eos_token_id, _config_eos(model), hf.eos_token_id):
        if value is not None:
            return as_ids(value)
    return ()


def as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """Token ids however transformers writes them: one, several or none.

    >>> as_ids(2), as_ids([1, 2]), as_ids(None)
    ((2,), (1, 2), ())
    """
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def prompt_text(tokenizer: Any, prompt: str | Messages) -> str:
    """What the model is shown for a prompt, as text: the string itself, or the rendered messages.

    Raises InputError where there is no chat template, or where it refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt
    held = tokenizers.wrap(tokenizer)
    if held.chat_template is None:
        raise InputError(
            "a prompt made of messages needs a chat template, and this tokenizer has none; give it as text"
        )
    try:
        messages = [dict(message) for message in prompt]
        text = held.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"the chat template refuses this prompt: {error}; prompt: {prompt!r}") from error
    return str(text)


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


@dataclass(frozen=True, slots=True)
class _Settings:
    """transformers: what `generate` takes as it is. stop_ids end an answer and are not shown."""

    transformers: Mapping[str, Any]
    new_tokens: int
    stop_ids: frozenset[int]
    stops: tuple[str, ...]


def _settings(model: Any, held: Tokenizer, generate: Mapping[str, Any], stop_sequences: Sequence[str]) -> _Settings:
    chosen = resolve(generate)
    new_tokens = chosen.pop("max_new_tokens")
    eos = as_ids(chosen.pop("eos_token_id", None)) or own_stop_ids(model, held)
    pad = next(index for index in (held.hf.pad_token_id, held.hf.eos_token_id, *eos, 0) if index is not None)
    settings = {"use_cache": True, **chosen, "eos_token_id": list(eos) or None, "pad_token_id": pad}
    return _Settings(settings, new_tokens, frozenset(eos), check_stops(stop_sequences))


def _objections(key: str, value: Any) -> list[Problem]:
    """What is wrong with a setting, by its name and kind; its range is transformers' to check."""
    where = f"generate.{key}"
    if key in _REFUSED:
        return [Problem(where, "cannot be used here", _REFUSED[key])]
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]
    if key not in known:
        close = difflib.get_close_matches(key, set(known) - _REFUSED.keys(), n=1)
        fix = f"did you mean {close[0]!r}?" if close else ""
        return [Problem(where, "is not a generation setting of transformers", fix)]
    if key == "max_new_tokens" and (not isinstance(value, int) or value < 1):
        return [Problem(where, f"{value!r} is not a whole number above 0")]
    if key in _NUMBERS and not isinstance(value, int | float | None):
        return [Problem(where, f"{value!r} is not a number")]
    return []


def _config_eos(model: Any) -> int | list[int] | None:
    # Not every configuration declares the field.
    return getattr(model.config.get_text_config(), "eos_token_id", None)


def _room(model: Any, prompt_tokens: int, new_tokens: int) -> int:
    """How many tokens an answer may have. Raises InputError where the prompt alone fills the context."""
    # Models without positions of a fixed number (Bloom, Mamba) have no such field.
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return new_tokens
    if prompt_tokens >= context:
        raise InputError(f"a prompt of {prompt_tokens} tokens leaves no room in a context of {context}; shorten it")
    return min(new_tokens, context - prompt_tokens)


def _prompt_ids(held: Tokenizer, prompt: str | Messages) -> list[int]:
    text = prompt_text(held, prompt)
    if not isinstance(prompt, str):
        ids = held.ids(text)
    else:
        ids = ([held.bos_id] if held.puts_bos and held.bos_id is not None else []) + held.literal(text, continues=False)
    if ids or held.start_ids:
        return ids or held.start_ids
    raise InputError("an empty prompt needs a BOS or EOS token to start from, and this tokenizer has neither")


def _batches(rows: Sequence[Sequence[int]], rooms: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows that are generated together: same room, similar length."""
    order = sorted(range(len(rows)), key=lambda index: (rooms[index], len(rows[index])))
    for _, group in groupby(order, key=rooms.__getitem__):
        members = list(group)
        yield from (members[i : i + BATCH_PROMPTS] for i in range(0, len(members), BATCH_PROMPTS))


def _new_ids(model: Any, held: Tokenizer, rows: Sequence[list[int]], room: int, settings: _Settings) -> list[list[int]]:
    """The ids each row is continued with, up to its first stop token.

    A row that a stop sequence ended goes on with padding, which the cut at that sequence takes away.
    """
    width = max(map(len, rows))
    criteria = [_StopSequences(held, width, settings.stops)] if settings.stops else []
    out = _generate(model, rows, room, settings, stopping_criteria=StoppingCriteriaList(criteria))
    return [_before(settings.stop_ids, row[width:]) for row in out.tolist()]


def _generate(model: Any, rows: Sequence[list[int]], room: int, settings: _Settings, **more: Any) -> torch.Tensor:
    """transformers' generate on left-padded rows. Raises InputError where it refuses the settings."""
    width = max(map(len, rows))
    pad = settings.transformers["pad_token_id"]
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    # max_length, not max_new_tokens: transformers warns at each call when a model's generation_config has a max_length.
    length = {"max_length": width + room, "max_new_tokens": None}
    try:
        return model.generate(input_ids=ids, attention_mask=mask, **length, **settings.transformers, **more)
    except ValueError as error:
        raise InputError(f"generate: {error}") from error


def _before(stop_ids: frozenset[int], ids: list[int]) -> list[int]:
    return next((ids[:position] for position, token in enumerate(ids) if token in stop_ids), ids)


def _decode(held: Tokenizer, ids: Sequence[int]) -> str:
    return str(held.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _StopSequences(StoppingCriteria):
    """Ends a row once its text holds a stop sequence, so that no more is written than will be shown."""

    def __init__(self, held: Tokenizer, width: int, stops: Sequence[str]) -> None:
        self.held, self.width, self.stops = held, width, stops
        # A character has at most four bytes, a token at least one; the rest is for tokens that are not shown.
        self.tail = 4 * max(map(len, stops)) + 8

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tails = [row[-self.tail :] for row in input_ids[:, self.width :].tolist()]
        done = [any(stop in _decode(self.held, tail) for stop in self.stops) for tail in tails]
        return torch.tensor(done, device=input_ids.device)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Queued(BaseStreamer):
    def __init__(self, ids: queue.Queue[int | BaseException | None]) -> None:
        self.ids, self.prompt_seen = ids, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.ids.put(int(value))
        self.prompt_seen = True

    def end(self) -> None:
        pass


class _Halted(StoppingCriteria):
    def __init__(self, halt: threading.Event) -> None:
        self.halt = halt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.halt.is_set(), device=input_ids.device)


def _live_ids(model: Any, held: Tokenizer, row: list[int], room: int, settings: _Settings) -> Iterator[int]:
    """New ids as they come, up to the first stop token."""
    ids: queue.Queue[int | BaseException | None] = queue.Queue()
    halt = threading.Event()

    def write() -> None:
        try:
            criteria = StoppingCriteriaList([_Halted(halt)])
            _generate(model, [row], room, settings, streamer=_Queued(ids), stopping_criteria=criteria)
            ids.put(None)
        except BaseException as error:  # whatever it is, the reader raises it
            ids.put(error)

    with evaluation_mode(model):
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            while (item := ids.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if item in settings.stop_ids:
                    return
                yield item
        finally:
            halt.set()
            writer.join()


def _pieces(held: Tokenizer, row: Sequence[int], ids: Iterator[int]) -> Iterator[str]:
    """Text as soon as its characters are whole; each piece is decoded after the few pieces before it."""
    before: deque[list[int]] = deque([list(row)], maxlen=4)
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = continuation(held, [index for chunk in before for index in chunk], pending)
        if text and not text.endswith("\ufffd"):
            yield text
            before.append(pending)
            pending = []
    if pending:
        yield continuation(held, [index for chunk in before for index in chunk], pending)


def _until_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces up to the first stop sequence; an end that may turn out to belong to one is held back."""
    text, shown = "", 0
    for piece in pieces:
        text += piece
        if any(stop in text for stop in stops):
            break
        safe = _safe_length(text, stops)
        if safe > shown:
            yield text[shown:safe]
            shown = safe
    rest = cut(text, stops)[shown:]
    if rest:
        yield rest


def _safe_length(text: str, stops: Sequence[str]) -> int:
    """How many characters can be shown, whatever follows.

    >>> _safe_length("Paris. \\n", ["\\n\\n"]), _safe_length("Paris ", [])
    (6, 6)
    """
    if not stops:
        return len(text)
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return len(text[: len(text) - held].rstrip())


def _turn(
    model: Any,
    held: Tokenizer,
    history: list[dict[str, str]],
    write: Callable[[str], None],
    generate: Mapping[str, Any],
) -> list[dict[str, str]]:
    """The history with the answer to its last message, or without that message where there is none."""
    answer = ""
    try:
        for piece in stream(model, held, history, generate=generate):
            # Templates put their own white space around an answer; the one that the model wrote is not repeated.
            piece = piece if answer else piece.lstrip()
            answer += piece
            write(piece)
    except InputError as error:
        write(f"[{error}; /reset starts anew]\n")
        return history[:-1]
    except KeyboardInterrupt:
        write("\n")
        return history[:-1]
    write("\n")
    return [*history, {"role": "assistant", "content": answer.rstrip()}]


def _stream_one(
    model: Any, held: Tokenizer, prompt: str | Messages, heading: str, generate: Mapping[str, Any], stops: Sequence[str]
) -> str:
    _write(heading)
    answer = ""
    for piece in stream(model, held, prompt, generate=generate, stop_sequences=stops):
        answer += piece
        _write(piece)
    _write("\n")
    return answer


def _render(held: Tokenizer, prompt: str, render: Render) -> str | Messages:
    if render == "chat" and held.chat_template is None:
        raise InputError("render: chat needs a chat template, and this model has none; use raw")
    is_chat = render == "chat" or (render == "auto" and held.chat_template is not None)
    return [{"role": "user", "content": prompt}] if is_chat else prompt


def _heading(prompt: str, prompts: int) -> str:
    """Names the prompt where there are several answers to tell apart."""
    return f"--- {prompt.strip().splitlines()[0] if prompt.strip() else '(empty)'}\n" if prompts > 1 else ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _typed_lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    console = Console()
    console.print("[dim]/reset forgets the conversation, /quit ends[/dim]")
    while True:
        try:
            yield console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            return
