"""Nothing that deft loads can run code or lead outside, and nothing that it writes holds a secret."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_llama

import deft
from deft.core.errors import InputError
from deft.core.redact import MARK, redacted, redacted_json
from deft.encoding import tokenizer
from deft.model.load import inspect

SOURCE = Path(deft.__file__).parent
UNSAFE = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.load", "torch.save",
    "eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader",
    "os.system", "os.popen", "pandas",
}  # fmt: skip
"""Modules and functions that run what they read."""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_uses(code: str) -> list[str]:
    """What in a module could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{name}" for name in names)]
        if isinstance(node, ast.Call):
            names.append(dotted(node.func))
            for keyword in node.keywords:
                is_true = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is not True)
                if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and is_true:
                    names.append(f"{keyword.arg}=True")
                if keyword.arg == "weights_only":
                    names.append("weights_only")
        names = [name for name in names if name in UNSAFE or "=True" in name or name.partition(".")[0] in UNSAFE]
        found += [f"{getattr(node, 'lineno', 0)}: {name}" for name in names]
    return found


def test_no_module_runs_what_it_reads() -> None:
    found = {str(path.relative_to(SOURCE)): unsafe_uses(path.read_text()) for path in SOURCE.rglob("*.py")}
    assert len(found) > 80
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
        "np.load('x', allow_pickle=True)", "np.load('x', allow_pickle=flag)", "eval('1')", "exec(code)",
        "import yaml\nyaml.load(text)", "A.from_pretrained('x', trust_remote_code=True)", "import shelve, marshal",
        "subprocess.run('x', shell=True)",
    ],
)  # fmt: skip
def test_the_search_finds_it(code: str) -> None:
    assert unsafe_uses(code)


def test_the_search_leaves_the_rest_alone() -> None:
    assert unsafe_uses("import re\nre.compile('x')\nnp.load('x', allow_pickle=False)\nyaml.safe_load(t)") == []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trust_remote_code": True}, r"config\.json: trust_remote_code: asks to trust code"),
        ({"text_config": {"trust_remote_code": True}}, r"config\.json: text_config\.trust_remote_code: asks"),
        ({"text_config": {"auto_map": {}}}, r"config\.json: text_config\.auto_map: names code"),
        ({"_attn_implementation_internal": "someone/kernel"}, r"names someone/kernel, code to be fetched and run"),
        ({"a": [{"_experts_implementation": "someone/kernel"}]}, r"config\.json: a\._experts_implementation: names"),
    ],
)
def test_a_config_that_asks_for_code_is_refused(model: Path, changes: dict[str, Any], says: str) -> None:
    edit(model / "config.json", **changes)
    with pytest.raises(InputError, match=says):
        inspect(str(model))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../model.safetensors", "is not a file beside it"),
        ("/etc/passwd", "is not a file beside it"),
        ("a\0.safetensors", "is not a file beside it"),
        ("..\\model.safetensors", "is not a file beside it"),
        ("part/../../x.safetensors", "is not a file beside it"),
        (7, "is not a file beside it"),
        ("pytorch_model-00001.bin", "is pickled, and a pickle can run code; save it with model.save_pretrained"),
    ],
)
def test_an_index_names_only_safetensors_beside_it(model: Path, name: Any, says: str) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=says):
        inspect(str(model))


def test_a_tokenizer_that_brings_its_own_code_is_refused(model: Path) -> None:
    edit(
        model / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", "code.Mine"]}
    )
    (model / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(InputError, match="its tokenizer brings its own code, which is not run; save one"):
        tokenizer.load(str(model))


def test_a_pickled_adapter_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    (model / "adapter_model.bin").touch()
    with pytest.raises(InputError, match=r"a model and an adapter.*adapter_\* files"):
        inspect(str(model))


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("hub_token=abc", "abc"),
        ("template_kwargs.api_key='a b c'", "a b c"),
        ("https://me:pw@host/x.jsonl", "pw"),
        ("https:/me:pw@host/x.jsonl", "pw"),
        ("{'password': 'pw', 'a': 1}", "pw"),
        ("a: 1\napi_key: x-y-z\nb: 2", "x-y-z"),
        ("it is hf_abcdefghijklmnopqrstuv", "hf_abcd"),
        ("the value was sesame-open-42", "sesame-open-42"),
    ],
)
def test_secrets_are_hidden(text: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sesame-open-42")
    assert secret not in redacted(text)
    assert MARK in redacted(text)


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    monkeypatch.setenv("MY_TOKEN", "short")
    text = "microbatch_tokens=64 eos_token=</s> tokens: 5, 'pad_token': '<pad>', short, parallel, no token: nothing"
    assert redacted(text) == text
    value = {"eos_token": "</s>", "tokens": 5, "list": ["a", None]}
    assert redacted_json(value) == value
