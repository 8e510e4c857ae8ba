"""An independent judge of masks: it shares no code with deft's rendering, and sees ids, weights and notes alone.

It renders a row's own messages with transformers' own function, and says of each run of learnt tokens what is wrong:

1. the decoded tokens before it are the inference prompt: messages[:i] with the generation prompt, handed over as usual
   or as a note of the row says; each learnt message once;
2. the decoded run is what the conversation's own text has after that prompt, to the character. Where a note says that
   the prompt is no prefix of that text, the run's answer stands in it, and before it only the message's reasoning;
3. it holds all words of its message, and of no other;
4. it ends with the mark that follows a made-up answer in the template's text, or with EOS, and nothing comes after it.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

REASONING = (
    ("<think>", "</think>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<reasoning>", "</reasoning>"),
    ("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),
)


class _Noon(datetime):
    """The time that deft tells templates, which transformers takes from the clock."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _Noon:
        return cls(2025, 1, 1, 12)


chat_template_utils.datetime = _Noon

ANCHORS = (
    "same header",
    "same but for white space",
    "closes an empty reasoning block",
    "strips the answer's own reasoning",
    "an empty reasoning block is learnt",
)
_QUOTES = re.compile(r"""\A(<\|"\|>|[\\"'}\])])+\s*""")
"""What closes the last argument: a made-up text's, which a number does not have."""

LOOKS_LIKE_A_MARK = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")


@dataclass(frozen=True)
class Call:
    """One way to call apply_chat_template. `anchor`: how, by a note, the answer follows a prompt that is no prefix."""

    kwargs: tuple[tuple[str, Any], ...] = ()
    shape: frozenset[str] = frozenset()
    inline: tuple[str, str] | None = None
    anchor: str = ""


@dataclass(frozen=True)
class Row:
    """A conversation as OpenAI writes it, `learnt` the indices of the messages to be learnt."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    learnt: Sequence[int]


@dataclass
class Judge:
    """Judges the examples of one template and tokenizer.

    kwargs   what the user gives the template at every call (`template_kwargs`)
    _shapes  remembers what made-up answers are followed by
    """

    template: str
    tokenizer: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    _shapes: dict[Any, Any] = field(default_factory=dict)

    def wrong(self, row: Row, parts: Sequence[tuple[np.ndarray, np.ndarray]], notes: Sequence[str] = ()) -> list[str]:
        """What is wrong with a row's parts, each (ids, weights); nothing where all is right."""
        case = _Case(self, row)
        found: list[int] = []
        problems: list[str] = []
        for ids, weights in parts:
            for start, end in runs(weights):
                prompt, target = self.decoded(ids[:start]), self.decoded(ids[start:end])
                index, why = case.best(prompt, target, calls(notes, self.template), found)
                if index is None:
                    problems.append(f"no inference prompt ends here: ...{prompt[-60:]!r} | {target[:60]!r}")
                    continue
                found.append(index)
                problems += [f"messages[{index}]: {each}" for each in why]
        if sorted(found) != sorted(row.learnt):
            problems.append(f"messages {sorted(found)} are learnt, not {sorted(row.learnt)}")
        return problems

    def unjust(self, row: Row, reason: str) -> list[str]:
        """What is wrong with a refusal; nothing where it is right, or of a kind that is not judged."""
        case = _Case(self, row)
        texts = [(case.text(i, True, Call()), case.text(i + 1, False, Call())) for i in row.learnt]
        if "refuses this conversation" in reason:
            return [] if any(text is None for pair in texts for text in pair) else ["transformers renders it"]
        if any(text is None for pair in texts for text in pair):
            return []
        hidden = re.search(r"the template shows .* of messages\[(\d+)\] \((?!assistant)", reason)
        if hidden:
            said = self.comparable(squeezed(row.messages[int(hidden[1])]["content"]))
            forms = {said, *(squeezed(json.dumps(said, ensure_ascii=is_ascii)[1:-1]) for is_ascii in (False, True))}
            shown = any(form in squeezed(text or "") for _, text in texts for form in forms)
            return ["its words are shown"] if shown else []
        pairs = [(prompt or "", text or "") for prompt, text in texts]
        answers = [squeezed(text.removeprefix(prompt)) for prompt, text in pairs]
        is_whole = [not case.missing(i, answer) for i, answer in zip(row.learnt, answers, strict=True)]
        is_prefix = [text.startswith(prompt) for prompt, text in pairs]
        is_judged = "cannot be followed" not in reason and "no mark can be told" not in reason
        if all(is_whole) and all(is_prefix) and is_judged:
            return ["each prompt begins its conversation, and no word is lost"]
        if "drops words" in reason and all(is_whole):
            return ["no word is lost"]
        if "contradicts itself" in reason and all(is_prefix):
            return ["each prompt begins its conversation"]
        opened = re.search(r"opens a reasoning block \('(.*?)'\)", reason)
        if opened and not any(prompt.rstrip().endswith(opened[1]) for prompt, _ in pairs):
            return [f"no prompt ends with {opened[1]!r}"]
        return []

    @cached_property
    def tokens(self) -> dict[str, str]:
        return {k: str(v) for k, v in self.tokenizer.special_tokens_map.items() if isinstance(v, str)}

    @cached_property
    def special(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special]

    def decoded(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self.comparable(text)

    def comparable(self, text: str) -> str:
        """As a tokenizer that normalizes gives it back."""
        return unicodedata.normalize("NFC", text)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], call: Call, prompt: bool
    ) -> str | None:
        """What transformers renders; None where it raises."""
        given = list(tools) or ([] if "empty tools" in call.shape else None)
        try:
            text = render_jinja_template(
                [[shaped(message, call) for message in messages]],
                tools=given,
                chat_template=self.template,
                add_generation_prompt=prompt,
                **{**self.tokens, **self.kwargs, **dict(call.kwargs)},
            )[0][0]
        except Exception:  # whatever a template raises
            return None
        return self.comparable(text)

    def ending(self, row: Row, index: int, call: Call) -> tuple[str, bool]:
        """How messages[index] must end, found with made-up answers; of tool calls only the mark.

        And whether the template writes words of other messages after the prompt.
        """
        key = (tuple(map(_form, row.messages[: index + 1])), call, bool(row.tools))
        if key not in self._shapes:
            self._shapes[key] = self._ending(row, index, call)
        return self._shapes[key]

    def _ending(self, row: Row, index: int, call: Call) -> tuple[str, bool]:
        message = row.messages[index]
        answer = {"role": "assistant", "content": _word(index)}
        if message.get("reasoning_content"):
            answer |= {"reasoning_content": _word(index, "rz"), "reasoning": _word(index, "rz")}
        tails, header, strange = self._after(row, index, call, answer)
        end = _marked(tails, header, self.tokenizer.eos_token, self.special)
        if not message.get("tool_calls"):
            return end, strange
        *calls, last = message["tool_calls"]
        probe = {**last, "function": {**last["function"], "arguments": {"probe": _word(index)}}}
        answer = {**_made_up(message, index), "tool_calls": [*calls, probe]}
        answer["content"] = "probe" if message["content"] else message["content"]
        tails, header, strange = self._after(row, index, call, answer)
        close = os.path.commonprefix(tails)
        plain = next((mark for mark in self.special if end.endswith(mark)), end.strip())
        if plain in close and self.tokenizer.eos_token not in close:
            return _QUOTES.sub("", _up_to(close, plain)), strange
        end = _marked(tails, header, self.tokenizer.eos_token, self.special)
        if end == self.tokenizer.eos_token not in close:
            end = _before_header(close, header, self.special).rstrip() + end
        return _QUOTES.sub("", end), strange

    def _after(self, row: Row, index: int, call: Call, answer: Mapping[str, Any]) -> tuple[list[str], str, bool]:
        """What follows a made-up answer to messages[:index], at the very end and before each possible next message.

        Then the header that the generation prompt writes; and whether other messages' words come after the prompt.
        """
        before = [_made_up(message, i) for i, message in enumerate(row.messages[:index])]
        said = _word(index)
        nexts = [({**_next(answer), "role": role},) for role in ("user", "tool", "assistant")]
        texts = [self.render([*before, answer, *then], row.tools, call, False) for then in ((), *nexts)]
        tails = [text.partition(said)[2] for text in texts if text and said in text]
        header = self._header(before, row.tools, call) or self._header([{"role": "user", "content": "a"}], (), call)
        prompt = self.render(before, row.tools, call, True)
        own = (texts[0] or "").removeprefix(prompt or "\0")
        strange = own != texts[0] and any(_word(i, z) in own for i in range(index) for z in ("qz", "rz"))
        return tails or [""], header, strange

    def _header(self, before: Sequence[Mapping[str, Any]], tools: Sequence[Any], call: Call) -> str:
        bare, prompt = (self.render(before, tools, call, is_prompt) or "" for is_prompt in (False, True))
        return prompt.removeprefix(bare).strip() if bare and prompt.startswith(bare) else ""


@dataclass
class _Case:
    """One row under a judge."""

    judge: Judge
    row: Row
    _texts: dict[Any, str | None] = field(default_factory=dict)

    def text(self, end: int, prompt: bool, call: Call) -> str | None:
        key = (end, prompt, call)
        if key not in self._texts:
            self._texts[key] = self.judge.render(self.row.messages[:end], self.row.tools, call, prompt)
        return self._texts[key]

    def best(
        self, prompt: str, target: str, known: Sequence[Call], found: Sequence[int]
    ) -> tuple[int | None, list[str]]:
        """The message whose inference prompt this is, and what is wrong with the run in the best of the known ways."""
        tried = [
            (index, self.target(index, call, target))
            for call in known
            for index in self.row.learnt
            if index not in found and self.text(index, True, call) == prompt
        ]
        return min(tried, key=lambda each: len(each[1]), default=(None, []))

    def target(self, index: int, call: Call, target: str) -> list[str]:
        """What is wrong with a run of tokens after the inference prompt of messages[index]."""
        prompt, text = self.text(index, True, call) or "", self.text(index + 1, False, call)
        if text is None:
            return ["transformers does not render it"]
        end, is_strange = self.judge.ending(self.row, index, call)
        if text.startswith(prompt):
            where = self._exact(text[len(prompt) :], target, end)
            if where and call.anchor:
                where = self._anchored(index, call, text, target, end)
        elif call.anchor:
            where = self._anchored(index, call, text, target, end)
        else:
            where = ["the prompt does not begin the conversation, and no note says so"]
        return [*where, *self._all(index, prompt, target, end, is_strange)]

    def _all(self, index: int, prompt: str, target: str, end: str, is_strange: bool) -> list[str]:
        missing = self.missing(index, squeezed(target), squeezed(prompt))
        return [
            *([f"{missing[0][:60]!r} is not in {target[:80]!r}"] if missing else []),
            *(["the template writes other messages inside"] if is_strange else []),
            *self._stop(target, end),
        ]

    def _exact(self, rest: str, target: str, end: str) -> list[str]:
        """The run is the beginning of what the conversation has there, and maybe a mark that it lacks."""
        if any(target.endswith(mark) and rest.startswith(target.removesuffix(mark)) for mark in self._appendable(end)):
            return []
        same = len(os.path.commonprefix([target, rest]))
        return [f"{target[same : same + 60]!r} stands where the template writes {rest[same : same + 60]!r}"]

    def _appendable(self, end: str) -> list[str]:
        return ["", *(mark for mark in (self.judge.tokenizer.eos_token, end.strip()) if mark)]

    def _anchored(self, index: int, call: Call, text: str, target: str, end: str) -> list[str]:
        """The answer stands in the conversation; before it, where the note says so, reasoning and its marks."""
        bodies = [target.removesuffix(mark) for mark in self._appendable(end)]
        if any(body.strip() in text for body in bodies):
            return []
        for body, (opening, closing) in product(bodies, REASONING if "reasoning" in call.anchor else ()):
            thought, mark, answer = body.partition(closing.strip())
            if mark and answer.strip() in text:
                said = squeezed(
                    self.row.messages[index].get("reasoning_content") or self.row.messages[index]["content"]
                )
                left = self.judge.comparable(squeezed(thought).removeprefix(squeezed(opening)))
                return [] if left in self.judge.comparable(said) else [f"{thought[:60]!r} is not its reasoning"]
        return [f"{target[:80]!r} does not stand in the conversation"]

    def _stop(self, target: str, end: str) -> list[str]:
        said = f"it ends with {target[-50:]!r}"
        if target != target.rstrip():
            return [f"{said}: white space after the mark"]
        return [] if end and target.endswith(end) else [f"{said}, not with {end!r}"]

    def missing(self, index: int, target: str, prompt: str = "") -> list[str]:
        """The words of messages[index] that are not there, white space aside, less what the prompt wrote of them."""
        message = self.row.messages[index]
        words = [squeezed(message.get("reasoning_content") or ""), squeezed(message.get("content") or "")]
        words = [self.judge.comparable(word) for word in words if word]
        if words and LOOKS_LIKE_A_MARK.match(words[0]):
            opened = max((n for n in range(41) if prompt.endswith(words[0][:n])), default=0)
            words[0] = words[0][opened:]
        lost = [word for word in words if word not in target]
        for word in words:
            target = target.replace(word, "\n", 1)  # a call that the reasoning talks about is not made by it
        names = [squeezed(call["function"]["name"]) for call in message.get("tool_calls") or ()]
        lost += [name for name in names if target.count(name) < names.count(name)]
        values = [value for call in message.get("tool_calls") or () for value in leaves(call["function"]["arguments"])]
        return lost + [value for value in values if not any(form in target for form in self._forms(value))]

    def _forms(self, value: str) -> set[str]:
        """How a text may stand in Python's or JSON's text, or in JSON inside JSON."""
        once = [json.dumps(value, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True)]
        twice = [json.dumps(each, ensure_ascii=is_ascii)[1:-1] for each in once for is_ascii in (False, True)]
        return {squeezed(self.judge.comparable(each)) for each in (value, repr(value)[1:-1], *once, *twice)}


def calls(notes: Sequence[str], template: str) -> list[Call]:
    """The usual way to call a template, and those that the notes name.

    >>> [call.kwargs for call in calls(["enable_thinking=false, same header"], "")]
    [(), (('enable_thinking', False),)]
    """
    found = [Call()]
    for note in notes:
        pairs = re.findall(r"(\w+)=(true|false|\"\w+\")", note)
        kwargs = [(name, json.loads(value)) for name, value in pairs]
        kwargs += [(name, "") for name in re.findall(r"(\w+) is empty, as", note)]
        names = {"tools=[]": "empty tools", "typed parts": "parts", "as JSON text": "text", "as null": "null"}
        shape = frozenset(name for words, name in names.items() if words in note)
        anchor = next((words for words in ANCHORS if words in note), "")
        inline = [marks for marks in REASONING if marks[0].strip() in template or marks[1] in template]
        for marks in inline if "reasoning inside content" in note else [None]:
            found.append(Call(tuple(kwargs), shape, marks, anchor))
    return found


def runs(weights: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of the runs of tokens with weight."""
    learnt = np.concatenate([[0], (weights > 0).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(learnt))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def squeezed(text: str) -> str:
    return "".join(text.split())


def leaves(arguments: Any) -> list[str]:
    """The texts and numbers of a tool call's arguments."""
    if isinstance(arguments, str):
        parsed = _parsed(arguments)
        return [arguments] if isinstance(parsed, str) else leaves(parsed)
    if isinstance(arguments, Mapping):
        return [leaf for pair in arguments.items() for each in pair for leaf in _leaf(each)]
    return []


def _leaf(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return leaves(value)
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaf(item)]
    return (
        [value if isinstance(value, str) else repr(value)]
        if isinstance(value, str | int | float) and not isinstance(value, bool)
        else []
    )


def _parsed(arguments: str) -> Any:
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def shaped(message: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """The message as that call hands it over: arguments as an object, unless the call says text."""
    changed = dict(message)
    if call.inline and message.get("reasoning_content"):
        opening, closing = call.inline
        changed["content"] = f"{opening}{message['reasoning_content']}{closing}{message['content']}"
        del changed["reasoning_content"], changed["reasoning"]
    if "parts" in call.shape and isinstance(changed["content"], str):
        changed["content"] = [{"type": "text", "text": changed["content"]}]
    if "null" in call.shape and not message["content"] and message.get("tool_calls"):
        changed["content"] = None
    if message.get("tool_calls"):
        changed["tool_calls"] = [_call(each, "text" in call.shape) for each in message["tool_calls"]]
    return changed


def _call(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not as_text and isinstance(arguments, str):
        arguments = _parsed(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _form(message: Mapping[str, Any]) -> tuple[Any, ...]:
    return message["role"], *(bool(message.get(name)) for name in ("content", "reasoning_content", "tool_calls"))


def _made_up(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with made-up words where people wrote."""
    changed = dict(message)
    if message.get("content"):
        changed["content"] = _word(index)
    if message.get("reasoning_content"):
        changed |= {"reasoning_content": _word(index, "rz"), "reasoning": _word(index, "rz")}
    return changed


def _word(index: int, begins: str = "qz") -> str:
    """A made-up word without digits for messages[index]; none is part of another."""
    return begins + "".join(chr(ord("a") + int(digit)) for digit in str(index)) + "xq"


def _next(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What follows a made-up answer: a few words, and for tools the call that they answer."""
    calls = answer.get("tool_calls") or [{"function": {}}]
    named = {"name": calls[0]["function"].get("name"), "tool_call_id": calls[0].get("id")}
    return {"content": "probe"} | {name: value for name, value in named.items() if value is not None}


def _marked(tails: Sequence[str], header: str, eos: str, special: Sequence[str]) -> str:
    """How an answer must end, after its last word.

    The first of: EOS that always follows; the one special token that does, or what looks like one; EOS at the very
    end; the last of several special tokens before the next header; the mark before the next turn; EOS.
    """
    here, *then = tails
    close = os.path.commonprefix(tails)
    marks = [mark for mark in special if mark in close]
    marks = [mark for mark in marks if not any(mark != other and mark in other for other in marks)]
    if eos in close:
        return _up_to(close, eos)
    if len(marks) == 1 and close.count(marks[0]) == 1:
        return _up_to(close, marks[0])
    if LOOKS_LIKE_A_MARK.fullmatch(close.strip()):
        return close.rstrip()
    if eos in here:
        return _up_to(here, eos)
    own = _before_header(close, header, special).rstrip()
    if header.strip() and any(own.endswith(mark) and own.count(mark) == 1 for mark in marks):
        return own
    begun = os.path.commonprefix(then).lstrip() if not here.strip() else ""
    return max((mark for mark in special if begun.startswith(mark)), key=len, default=eos)


def _before_header(close: str, header: str, special: Sequence[str]) -> str:
    """What follows an answer, up to where the next header begins."""
    at = [header.find(mark) for mark in special if mark in header]
    at += [found.start() for found in [LOOKS_LIKE_A_MARK.search(header)] if found]
    opener = max((mark for mark in special if at and header.startswith(mark, min(at))), key=len, default="")
    opener = opener or next(iter(LOOKS_LIKE_A_MARK.findall(header)), "")
    own = close.partition(opener)[0] if opener else close
    return own[: own.rindex("<")] if re.search(r"<[^<>\s]{0,40}\Z", own) else own


def _up_to(text: str, mark: str) -> str:
    return text[: text.index(mark) + len(mark)]
