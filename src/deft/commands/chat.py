"""`deft generate` and `deft chat`: answers to prompts, and a conversation, written as the model generates them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from deft.core.errors import InputError
from deft.core.redact import visible
from deft.encoding import tokenizer as tokenizers
from deft.evaluation import prompt_form
from deft.evaluation.generate import check_stops, load, resolve
from deft.evaluation.prompt_form import PromptForm
from deft.evaluation.streaming import stream
from deft.tracking.console import lasting


def run_generate(
    model_path: str | Path,
    prompts: Sequence[str],
    *,
    is_chat: bool | None = None,
    generate: Mapping[str, Any] | None = None,
    stop_sequences: Sequence[str] = (),
) -> list[str]:
    """`deft generate`: writes the answers to standard output as they come and returns them.

    is_chat  whether each prompt is the user's message in the chat template; None asks the model as it was trained

    A line on standard error says which. Several answers stand under a line with their prompt.
    """
    settings = resolve(generate or {})
    check_stops(stop_sequences)
    model, tokenizer = load(model_path)
    form, line = prompt_form.chosen(model_path, tokenizer, is_chat)
    _note(line)
    answers = []
    for prompt in prompts:
        if len(prompts) > 1:
            _write(f"--- {prompt.strip().partition(chr(10))[0] or '(empty)'}\n")
        pieces = stream(
            model,
            tokenizer,
            form.shown(prompt),
            generate=settings,
            stop_sequences=stop_sequences,
            template_kwargs=form.template_kwargs,
        )
        answers.append(_written(pieces, _write))
    return answers


def run_chat(model_path: str | Path, system: str | None = None, generate: Mapping[str, Any] | None = None) -> None:
    """`deft chat`: a prompt on a terminal, plain lines from a pipe; the end of the input ends it."""
    settings = resolve(generate or {})
    model, tokenizer = load(model_path)
    trained = prompt_form.recorded(model_path)
    if trained and not trained.is_chat:
        _note("warning: this model was trained on raw text, not on chats: `deft generate` asks it as it was trained")
    given = trained.template_kwargs if trained else {}
    if tokenizer.chat_template is not None:
        _note(str(PromptForm(True, given)))
    chat(model, tokenizer, _typed_lines(), _write, system=system, generate=settings, template_kwargs=given)


def chat(
    model: Any,
    tokenizer: Any,
    lines: Iterable[str],
    write: Callable[[str], None],
    *,
    system: str | None = None,
    generate: Mapping[str, Any],
    template_kwargs: Mapping[str, Any] | None = None,
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
            history = [*history, {"role": "user", "content": text}]
            pieces = partial(stream, model, held, history, generate=generate, template_kwargs=template_kwargs)
            answer = _answer(pieces, write)
            history = history[:-1] if answer is None else [*history, {"role": "assistant", "content": answer}]


def _answer(begin: Callable[[], Iterator[str]], write: Callable[[str], None]) -> str | None:
    """An answer, written piece by piece; None where its conversation does not fit, or Ctrl-C stops it."""
    try:
        # Templates put their own white space around an answer; the one that the model wrote is not repeated.
        return _written(begin(), write, is_stripped=True).rstrip()
    except InputError as error:
        write(f"[{error}; /reset starts anew]\n")
    except KeyboardInterrupt:
        write("\n")
    return None


def _written(pieces: Iterator[str], write: Callable[[str], None], is_stripped: bool = False) -> str:
    """Writes the pieces of an answer and the end of its line; `is_stripped`: without white space at its beginning."""
    answer = ""
    for piece in pieces:
        text = piece.lstrip() if is_stripped and not answer else piece
        answer += text
        write(text)
    write("\n")
    return answer


def _write(text: str) -> None:
    print(visible(text) if sys.stdout and sys.stdout.isatty() else text, end="", file=lasting(sys.stdout), flush=True)


def _note(line: str) -> None:
    print(line, file=lasting(sys.stderr), flush=True)


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
