"""The one place where the data half meets transformers: a tokenizer as deft uses it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from deft.core import files
from deft.core.errors import InputError
from deft.encoding.ascii_words import AsciiWords
from deft.encoding.coverage import Coverage, keeps_all, steps
from deft.encoding.render.stop import Marks, any_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids with the characters [start, end) each covers. White space may be missing at either end of a token's range."""

    ids: list[int]
    starts: list[int]


@dataclass(frozen=True, slots=True)
class Remade:
    """A text that transformers' tokenizer of a folder encodes otherwise than the folder's tokenizer.json says."""

    by: str
    text: str
    ids: list[int]
    ids_of_file: list[int]
    loses_text: bool

    def __str__(self) -> str:
        what = "loses text" if self.loses_text else "encodes otherwise"
        return (
            f"transformers reads tokenizer.json as its {self.by}, which {what}: {self.text!r} is "
            f"{self.ids[:8]}, by the file itself {self.ids_of_file[:8]}"
        )


@dataclass(frozen=True)
class Tokenizer:
    """A fast Hugging Face tokenizer, and what deft has to know about it.

    hf            the tokenizer itself, never changed
    new_ids       those of tokens that it has been given, for which the model is to get rows
    chat_template its own template, None where it has none
    """

    hf: PreTrainedTokenizerFast
    new_ids: range = range(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.hf, self.new_ids)  # what is known of it is found out again

    @cached_property
    def bos_id(self) -> int | None:
        return self.hf.bos_token_id

    @cached_property
    def eos_id(self) -> int | None:
        return self.hf.eos_token_id

    @cached_property
    def remade(self) -> Remade | None:
        """How it differs from the tokenizer.json that it was loaded from, if it does."""
        return _how_remade(self.hf)

    @property
    def warning(self) -> str:
        """What whoever loads it with transformers should know, or nothing."""
        if getattr(self.hf.backend_tokenizer, "fix_mistral_regex", None) is False:
            fix = "set fix_mistral_regex: true in its tokenizer_config.json"
            return f"transformers says that this tokenizer cuts words with a wrong regular expression; {fix}"
        return str(self.remade) if self.remade else ""

    @cached_property
    def puts_bos(self) -> bool:
        """True where the tokenizer itself begins a text with BOS."""
        return self.bos_id is not None and self.hf("a", add_special_tokens=True)["input_ids"][:1] == [self.bos_id]

    @cached_property
    def start_ids(self) -> list[int]:
        """What stands before a text that begins with something learnt: BOS, or EOS where there is no BOS (trlx)."""
        start = self.bos_id if self.bos_id is not None else self.eos_id
        return [] if start is None else [start]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Control tokens: text -> id."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special and token.content}

    @cached_property
    def chat_template(self) -> str | None:
        """Of named ones the default; rows with tools go through `tool_use`, as transformers chooses at inference."""
        template = self.hf.chat_template
        return _with_tool_use(template) if isinstance(template, dict) else template

    @property
    def named_templates(self) -> Mapping[str, str]:
        """Its templates by name, where it has several."""
        return self.hf.chat_template if isinstance(self.hf.chat_template, dict) else {}

    def with_template(self, template: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        hf = copy.copy(self.hf)
        hf.chat_template = template
        return replace(self, hf=hf)

    def with_tokens(self, texts: Sequence[str]) -> Tokenizer:
        """The same tokenizer with more tokens, which are found in the text of any row, unlike its control tokens.

        One that was added before, to a model that is trained on, stays as it is. Raises InputError for a text that is a
        control token or an ordinary one already.
        """
        hf, vocabulary, added = copy.deepcopy(self.hf), self.hf.get_vocab(), self.hf.get_added_vocab()
        for text in texts:
            kind = "a control token" if text in self.special_tokens else "an ordinary token"
            if text in vocabulary and (text in self.special_tokens or text not in added):
                raise InputError(f"data.add_tokens: {text!r} is {kind} of this tokenizer already; leave it out")
        hf.add_tokens([tokenizers.AddedToken(text, normalized=False, special=False) for text in texts])
        new = sorted(hf.get_vocab()[text] for text in texts if text not in vocabulary)
        return replace(self, hf=hf, new_ids=range(new[0], new[-1] + 1) if new else range(0))

    @cached_property
    def template_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and the like as text: what transformers hands to a chat template."""
        return {name: str(token) for name, token in self.hf.special_tokens_map.items() if isinstance(token, str)}

    def marks(self, stop_ids: Sequence[int] = ()) -> Marks:
        """What can stop generation; `stop_ids` are those of the model's generation_config."""
        eos = [self.hf.eos_token] if self.hf.eos_token else []
        more = [self._backend.id_to_token(index) for index in stop_ids if index != self.bos_id]
        return Marks(
            self.hf.eos_token or "",
            tuple(dict.fromkeys([*eos, *(token for token in more if token)])),
            (*self.special_tokens,),
        )

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Texts -> tokens; special tokens in a text are read as control tokens, none is added."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [Tokens(e.ids, [start for start, _ in e.offsets]) for e in encodings]

    def between(self, text: str) -> bytes | None:
        """The ids, as int32, of a text that stands between special tokens; None where one stands in it."""
        quick = self._words.ids(text) if self._words else None
        if quick is not None:
            return quick
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return None if self._special_ids.intersection(encoding.ids) else _as_bytes(encoding.ids)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @cached_property
    def spells_bytes(self) -> bool:
        """True where ids alone say which text each of them covers: byte-level BPE that neither drops nor adds any."""
        model = self._backend.model
        if not isinstance(model, models.BPE) or any(self._backend.token_to_id(byte) is None for byte in _BYTES):
            return False
        cuts = steps(self._backend.pre_tokenizer, "pretokenizers")
        changes = any(step.get("behavior") == "Removed" or step.get("add_prefix_space") for step in cuts)
        changes = changes or any((model.dropout, model.continuing_subword_prefix, model.end_of_word_suffix))
        kinds = {step["type"] for step in cuts}
        is_normal = all(step["type"] == "NFC" for step in steps(self._backend.normalizer, "normalizers"))
        return {"ByteLevel"} <= kinds <= {"ByteLevel", "Digits", "Split"} and is_normal and not changes

    @cached_property
    def marks_are_apart(self) -> bool:
        """True where ids spell bytes, and texts between special tokens can be encoded each alone.

        So it is where no special token takes anything from the text beside it, or can overlap another token that is
        looked for before a text is cut into words.
        """
        added = [token for token in self._backend.get_added_tokens_decoder().values() if token.content]
        special, others = [token for token in added if token.special], [token.content for token in added]
        takes = any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in special)
        return self.spells_bytes and not takes and not _overlap([token.content for token in special], others)

    @cached_property
    def coverage(self) -> Coverage | None:
        """What it keeps of texts; None where it keeps every text whole."""
        return None if keeps_all(self._backend) else Coverage(self._continuing_literal)

    @cached_property
    def _words(self) -> AsciiWords | None:
        return AsciiWords.of(self._backend) if self.spells_bytes else None

    def _quick(self, text: str) -> list[int] | None:
        """The ids of a text in which no token stands that is looked for before it is cut into words."""
        ids = self._words.ids(text) if self._words else None
        found: list[int] | None = None if ids is None else np.frombuffer(ids, np.int32).tolist()
        return found

    def ids(self, text: str) -> list[int]:
        """The ids of a text that stands alone; special tokens in it are control tokens."""
        quick = self._quick(text)
        return self._backend.encode(text, add_special_tokens=False).ids if quick is None else quick

    def literal(self, text: str, continues: bool) -> list[int]:
        """The ids of a text in which special tokens are nothing but text.

        `continues`: the text goes on after other text, so that tokenizers that open a text with a space of their own
        (sentencepiece) do not put one.
        """
        quick = self._quick(text)
        backend = self._continuing_literal if continues else self._literal
        return backend.encode(text, add_special_tokens=False).ids if quick is None else quick

    def continuation(self, text: str) -> list[int]:
        """The ids of a text that goes on after other text; special tokens in it are control tokens."""
        quick = self._quick(text)
        return self._continuing.encode(text, add_special_tokens=False).ids if quick is None else quick

    def find_special(self, text: str) -> list[re.Match[str]]:
        """Where special tokens stand in a text, the longest first at each place."""
        return list(self._special_pattern.finditer(text))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return any_of(self.special_tokens)

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.hf.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        parts = {name: _state(getattr(self._backend, name)) for name in ("normalizer", "pre_tokenizer")}
        changed = {name: _without_prefix(part) for name, part in parts.items()}
        if changed == parts:
            return self._backend
        return tokenizers.Tokenizer.from_str(json.dumps(json.loads(self._backend.to_str()) | changed))

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        return _literally(self._backend)

    @cached_property
    def _continuing_literal(self) -> tokenizers.Tokenizer:
        return self._literal if self._continuing is self._backend else _literally(self._continuing)


def load(path: str, add_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a model folder or hub id, with more tokens.

    Raises InputError where there is none, where it is not a fast one, where it would have to run code, where
    transformers makes one of the folder's tokenizer.json that loses text, or where `add_tokens` are no new ones.
    """
    from transformers import AutoTokenizer  # it imports torch, which helping processes do without

    if (odd := files.odd_entry(Path(path))) is not None:
        raise InputError(f"{odd}: is no file that can be read; put the file in its place, or remove it")
    try:
        hf = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        hf("a")  # what its files say wrong of lengths and the like comes out here
    except Exception as error:  # of files of somebody else's; tokenizers raises bare ones
        if "custom code" in str(error):
            fix = "save one that transformers has, as tokenizer.json"
            raise InputError(f"{path}: its tokenizer brings its own code, which is not run; {fix}") from error
        raise InputError(f"{path}: no tokenizer can be loaded ({_first_line(error)}); {_advice(path)}") from error
    tokenizer = wrap(hf, path)
    if tokenizer.remade and tokenizer.remade.loses_text:
        raise InputError(f"{path}: {tokenizer.remade}; use a tokenizer that belongs to this architecture")
    return tokenizer.with_tokens(add_tokens) if add_tokens else tokenizer


def of(tokenizer: Any) -> Tokenizer:
    """A tokenizer that the caller holds, or the one of a folder or hub id."""
    return load(str(tokenizer)) if isinstance(tokenizer, str | Path) else wrap(tokenizer)


PROBES = ("Hello, world! It's 12345 o'clock.\n\n\tdef f(x): return x**2", "Grüße aus Köln: 日本語, 한국어, हिन्दी 😀")


def _how_remade(hf: PreTrainedTokenizerFast) -> Remade | None:
    """A probe that is encoded otherwise than by the tokenizer.json where it was loaded from, one that loses text first.

    For some architectures (qwen2 among them) transformers puts its own normalizer and pre-tokenizer in the place of
    those of the file, whatever tokenizer_config.json says (transformers 5.23, models/auto/tokenization_auto.py).
    """
    from transformers import PreTrainedTokenizerFast  # the configuration imports this module, and is quick

    file = _file_of(hf.name_or_path)
    if type(hf) is PreTrainedTokenizerFast or file is None or _cuts_text_like(hf, file):
        return None
    ours, by_file = hf.backend_tokenizer, tokenizers.Tokenizer.from_file(str(file))
    found = []
    for text in PROBES:
        ids, ids_of_file = (each.encode(text, add_special_tokens=False).ids for each in (ours, by_file))
        if ids != ids_of_file:
            kept, all_of_it = ours.decode(ids, False), by_file.decode(ids_of_file, False)
            found.append(Remade(type(hf).__name__, text, ids, ids_of_file, kept.split() != all_of_it.split()))
    return max(found, key=lambda each: each.loses_text, default=None)


def _file_of(name: str) -> Path | None:
    """The tokenizer.json of a folder, or of a hub id in the cache; None where there is none."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, "tokenizer.json", local_files_only=True) if name else None
    except OSError:
        return None
    return None if found is None else Path(found)


def _cuts_text_like(hf: PreTrainedTokenizerFast, file: Path) -> bool:
    """Whether a text goes through what a tokenizer.json says before words become ids; its vocabulary is not loaded."""
    said = json.loads(file.read_text(encoding="utf-8"))
    rest = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    parts = {name: said.get(name) for name in ("normalizer", "pre_tokenizer")}
    by_file = tokenizers.Tokenizer.from_str(json.dumps(rest | parts))
    return all(_state(getattr(hf.backend_tokenizer, name)) == _state(getattr(by_file, name)) for name in parts)


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def wrap(tokenizer: Any, name: str = "tokenizer") -> Tokenizer:
    """A tokenizer that the caller holds, as deft's. Raises InputError unless it is a fast one."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{name}: {type(tokenizer).__name__} is not a fast tokenizer; save it with a tokenizer.json")
    return Tokenizer(tokenizer)


def _with_tool_use(named: Mapping[str, str]) -> str | None:
    """One template of two; a line break after a block is not text, as transformers compiles templates.

    >>> _with_tool_use({"default": "a", "tool_use": "b"})
    '{% if tools %}\\nb{% else %}\\na{% endif %}'
    """
    default, tool_use = named.get("default"), named.get("tool_use")
    if default is None or tool_use is None:
        return default
    parts = (tool_use.removesuffix("\n"), default.removesuffix("\n"))
    return "{{% if tools %}}\n{}{{% else %}}\n{}{{% endif %}}".format(*parts)


def _as_bytes(ids: list[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _advice(path: str) -> str:
    if pointer := next((file.name for file in Path(path).glob("*.json") if file.read_bytes()[:8] == b"version "), None):
        return f"{pointer} is a pointer of git-lfs: run git lfs pull in the folder"
    if Path(path).is_dir():
        return "the folder needs tokenizer.json and tokenizer_config.json"
    return "name a folder that exists, or a hub id that this machine can reach"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _literally(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    literal = tokenizers.Tokenizer.from_str(backend.to_str())
    literal.encode_special_tokens = True
    return literal


def _overlap(tokens: Sequence[str], others: Sequence[str]) -> bool:
    """True if one of the tokens can stand in a text so that another one of `others` shares characters with it.

    >>> _overlap(["<s>"], ["<s>", "</s>"]), _overlap(["<s>"], ["<s>", ">>"]), _overlap(["<s>"], ["<s>", "s"])
    (False, True, True)
    """
    begins = {other[:length] for other in others for length in range(1, len(other))}
    ends = {other[-length:] for other in others for length in range(1, len(other))}
    for token in tokens:
        if any(token[-length:] in begins or token[:length] in ends for length in range(1, len(token))):
            return True
        if any(token != other and (token in other or other in token) for other in others):
            return True
    return False


_BYTES = pre_tokenizers.ByteLevel.alphabet()


def _without_prefix(part: Any) -> Any:
    """A normalizer's or pre-tokenizer's description without the space that it puts before a text.

    >>> _without_prefix({"type": "Metaspace", "prepend_scheme": "first"})
    {'type': 'Metaspace', 'prepend_scheme': 'never'}
    """
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    changed = dict(part)
    if part.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if part.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            changed[key] = [_without_prefix(inner) for inner in part[key]]
    return changed
