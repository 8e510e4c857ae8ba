"""A tokenizer.json of which transformers makes something else."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import write_llama
from tiny_writers import tokenizer_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from deft.commands import check
from deft.core.errors import InputError
from deft.encoding import tokenizer
from deft.run import config


def beside(family: str, folder: Path) -> Path:
    """The folder, as that of a model of another architecture."""
    AutoConfig.for_model(family, vocab_size=600).save_pretrained(folder)
    return folder


def words(folder: Path) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<unknown>": 0, "four": 1, "five": 2}, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unknown>")
    made.save_pretrained(folder)
    return made


def joins_digits(folder: Path) -> None:
    """Bytes, and "12" as one token."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "</s>"]
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, [("1", "2")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder)


def test_one_that_loses_text_is_refused(tmp_path: Path) -> None:
    words(tmp_path)
    assert tokenizer.load(str(beside("llama", tmp_path))).ids("five four") == [2, 1]
    beside("qwen2", tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("five four").input_ids != [2, 1], "transformers leaves it alone now"
    with pytest.raises(InputError, match=r'reads tokenizer\.json as its Qwen2Tokenizer, which loses text: "Hello'):
        tokenizer.load(str(tmp_path))


def test_one_that_only_cuts_words_otherwise_is_named(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    joins_digits(model)
    assert tokenizer.load(str(model)).remade is None
    settings = model / "tokenizer_config.json"
    said = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**said, "tokenizer_class": "Qwen2Tokenizer"}), encoding="utf-8")
    remade = tokenizer.load(str(model)).remade
    assert remade is not None
    assert (remade.by, remade.loses_text) == ("Qwen2Tokenizer", False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Two?", "completion": "2"}) + "\n", encoding="utf-8")
    made = config.make(config.nested({"model": str(model), "data__train": str(rows)}))
    found = check.run(made, console=Console(file=io.StringIO()))
    assert any("its Qwen2Tokenizer, which encodes otherwise" in finding.what for finding in found.findings)


def test_a_regular_expression_that_transformers_calls_wrong_is_a_warning() -> None:
    hf = copy.deepcopy(tokenizer_of("bytes"))
    assert tokenizer.wrap(hf).warning == ""
    hf.backend_tokenizer.fix_mistral_regex = False  # as transformers leaves it
    assert "wrong regular expression; set fix_mistral_regex: true" in tokenizer.wrap(hf).warning
