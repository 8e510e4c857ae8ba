"""The answer to one prompt, piece by piece, while another thread generates it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from deft.core.errors import InputError
from deft.evaluation.generate import Messages, Request, continuation, cut
from deft.model.causal_lm import evaluating

CONTEXT_TOKENS = 16
"""Tokens before a piece with which it is decoded."""


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str | Messages,
    *,
    generate: Mapping[str, Any],
    stop_sequences: Sequence[str] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """The pieces of one answer as they come; joined, they are what `complete` gives for the prompt.

    Errors of `complete` are raised at once; an error of the running model is raised from the iterator. Closing the
    iterator stops the model.
    """
    request = Request.of(model, tokenizer, generate, stop_sequences, template_kwargs)
    if request.settings.get("num_beams", 1) != 1:
        raise InputError("generate.num_beams: beams cannot be streamed; leave it out, or do not stream")
    row = request.prompt_ids(prompt)
    return _streamed(request, row, request.answer_length(row))


class _Pieces(BaseStreamer):
    """Puts text into `queue` as soon as its characters are whole and no stop sequence can begin in it, None at the end.

    transformers' TextStreamer loses spaces that a sentencepiece tokenizer writes as the first token of a piece.
    """

    def __init__(self, request: Request, row: list[int]) -> None:
        self.request, self.before, self.new = request, row, list[int]()
        self.text, self.shown, self.is_closed = "", 0, False
        self.queue: SimpleQueue[str | BaseException | None] = SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        """Takes the next id; the prompt, which `generate` puts first, has two dimensions. Raises EOFError if closed."""
        if self.is_closed:
            raise EOFError
        if value.ndim > 1 or not self.request.before_stop(value.tolist()):
            return
        self.new += value.tolist()
        self.text = continuation(self.request.held, self.before, self.new)
        answer = cut(self.text, self.request.stops)
        self._show(answer[: _safe_length(answer, self.request.stops)])
        if self.shown == len(self.text):  # so that a long answer is not decoded whole at each token
            self.before, self.new, self.text, self.shown = [*self.before, *self.new][-CONTEXT_TOKENS:], [], "", 0

    def end(self) -> None:
        self._show(cut(self.text, self.request.stops))
        self.queue.put(None)

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.queue.put(text[self.shown :])
            self.shown = len(text)


def _streamed(request: Request, row: list[int], new_tokens: int) -> Iterator[str]:
    """The pieces of the answer that another thread generates; errors of that thread are raised here."""
    pieces = _Pieces(request, row)

    def write() -> None:
        try:
            request.generate([row], new_tokens, streamer=pieces)
        except BaseException as error:
            pieces.queue.put(error)

    with evaluating(request.model):
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            while (piece := pieces.queue.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            pieces.is_closed = True
            writer.join()


def _safe_length(text: str, stops: Sequence[str]) -> int:
    """How many characters can be shown, whatever follows.

    >>> _safe_length("Paris. \\n", ["\\n\\n"]), _safe_length("Paris ", []), _safe_length("\\ufffd", [])
    (6, 6, 0)
    """
    whole = text.rstrip("\ufffd")
    if not stops:
        return len(whole)
    held = max((n for stop in stops for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0)
    return len(whole[: len(whole) - held].rstrip())
