"""final/ is its base, changed only by training: files as they are, configs that old and new transformers read alike."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_writers import TEMPLATE, model_of, tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deft.core.errors import InputError
from deft.encoding import tokenizer as tokenizers
from deft.export import carried
from deft.export.folder import export, verify
from deft.model import load as models
from deft.model import selftest, weight_files

OLD = Path(os.environ.get("DEFT_TRANSFORMERS_4", Path(sys.prefix) / "transformers-4"))
"""Where `make test` puts transformers 4, beside the one that deft runs with."""
ROWS = [[1, 20, 21, 22, 23, 24], [1, *range(10, 40)]]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
COMMON = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NESTED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    "qwen2": {"rope_theta": 1000000.0, "rope_scaling": YARN},
    "qwen3": {"rope_theta": 1000000.0, "head_dim": 8},
    "mistral": {"rope_theta": 1000000.0, "sliding_window": 32},
    "gemma2": {"rope_theta": 20000.0, "head_dim": 8, **NESTED},
    "gemma3_text": {"rope_theta": 1000000.0, "rope_local_base_freq": 20000.0, **NESTED},
    "phi3": {
        "rope_theta": 20000.0,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 4, "long_factor": [4.0] * 4},
    },
    "phi": {"rope_theta": 20000.0, "partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_emb_base": 20000, "rotary_pct": 0.5},
    "stablelm": {"rope_theta": 20000.0, "partial_rotary_factor": 0.5},
    "olmo2": {"rope_theta": 500000.0},
    "mixtral": {"rope_theta": 1000000.0, "num_local_experts": 4, "sliding_window": None},
}  # fmt: skip


def base_of(folder: Path, family: str, *, is_new: bool) -> Path:
    """A model folder as the hub has it, written by transformers 4, or by 5."""
    settings = copy.deepcopy(COMMON | FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **copy.deepcopy(settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer_of("bytes").save_pretrained(folder)
    if not is_new:
        document = {"architectures": [type(model).__name__], "model_type": family, "torch_dtype": "float32", **settings}
        (folder / "config.json").write_text(json.dumps(document, indent=2))
    return folder


def final_of(folder: Path, to: Path, **changed: Any) -> Path:
    base = models.inspect(str(folder))
    model = models.load(base, device="cpu", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"dtype": torch.float32, "stop_ids": (), "chat_template": None, "card": "# card\n", "weights": None}
    export(model, tokenizer, to, **(options | changed), base=folder, left_over=base.left_over)
    verify(to, model, tokenizer, ROWS, None, chat_template=changed.get("chat_template"))
    return to


READ_BY_THE_OLD = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
found = []
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found.append(model(torch.tensor([list(range(10, 60)) * 2])).logits)
print(json.dumps([float((a - b).norm() / a.norm()) for a, b in zip(found[::2], found[1::2])]))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_old_and_new_transformers_read_the_base(family: str, tmp_path: Path) -> None:
    """A base as transformers 4 wrote it: its own document is kept, both read the same model from final/."""
    base = base_of(tmp_path / "base", family, is_new=False)
    final = final_of(base, tmp_path / "final")
    own, kept = (json.loads((folder / "config.json").read_text()) for folder in (base, final))
    assert {key: kept[key] for key in own} == own
    assert kept.keys() - own.keys() <= {"dtype", "vocab_size"}
    names = frozenset({"_name_or_path"})
    assert len({str(carried.without(AutoConfig.from_pretrained(each).to_dict(), names)) for each in (base, final)}) == 1
    for path in base.glob("*token*"):
        assert (final / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif(not (OLD / "transformers").is_dir(), reason="transformers 4 is not installed beside")
def test_transformers_4_computes_what_it_computes_of_a_base_of_its_own(tmp_path: Path) -> None:
    """Bases written by transformers 5, of which 4 reads other positions: final/ says them in both ways."""
    folders = []
    for family in FAMILIES:
        old = base_of(tmp_path / family / "old", family, is_new=False)
        final = final_of(base_of(tmp_path / family / "new", family, is_new=True), tmp_path / family / "final")
        folders += [str(old), str(final)]
    environment = os.environ | {"PYTHONPATH": str(OLD), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", READ_BY_THE_OLD, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = dict(zip(FAMILIES, json.loads(done.stdout), strict=True))
    assert not {family: error for family, error in errors.items() if not error <= 1e-6}


def test_files_are_taken_over_and_code_is_not(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama", is_new=False)
    code = {"auto_map": {"AutoModelForCausalLM": "evil/repo--modeling.Evil"}}
    for name in ("config.json", "tokenizer_config.json"):
        document = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(document | code))
    for name in ("LICENSE.txt", "tokenizer.model", "modeling_evil.py", "training_args.bin", "notes.txt"):
        (base / name).write_text(name)
    (tmp_path / "secret").write_text("secret")
    (base / "NOTICE").symlink_to(tmp_path / "secret")
    final = final_of(base, tmp_path / "final")
    names = {path.name for path in final.iterdir()}
    assert {"LICENSE.txt", "tokenizer.model"} <= names
    assert not names & {"modeling_evil.py", "training_args.bin", "notes.txt", "NOTICE"}
    assert not any(b"evil" in path.read_bytes() for path in final.glob("*.json"))


def test_a_template_that_was_chosen_is_the_one_change(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama", is_new=False)
    (base / "chat_template.jinja").unlink()
    document = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE, "odd": [1]}
    (base / "tokenizer_config.json").write_text(json.dumps(document))
    other = TEMPLATE.replace("<assistant>", "<assistant>!")
    final = final_of(base, tmp_path / "final", chat_template=other)
    assert json.loads((final / "tokenizer_config.json").read_text()) == document | {"chat_template": other}
    assert AutoTokenizer.from_pretrained(final).chat_template == other
    assert (final / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_weights_that_the_model_does_not_take_stay(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama", is_new=False)
    more = {"model.layers.2.mtp": torch.randn(3, dtype=torch.bfloat16)}
    save_file(load_file(base / "model.safetensors") | more, base / "model.safetensors", {"format": "pt"})
    final = final_of(base, tmp_path / "final")
    for each in (final, final_of(final, tmp_path / "second")):
        assert torch.equal(load_file(each / weight_files.CARRIED)["model.layers.2.mtp"], more["model.layers.2.mtp"])


@pytest.mark.parametrize("settings", [{"pad_token_id": -1}, {"temperature": 0.6, "top_k": 20}])
def test_the_generation_config_is_the_bases(settings: dict[str, Any], tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama", is_new=False)
    document = {"eos_token_id": 2, "repetition_penalty": 1.1, "do_sample": "temperature" in settings, **settings}
    (base / "generation_config.json").write_text(json.dumps(document))
    final = final_of(base, tmp_path / "final", stop_ids=[7])
    kept = json.loads((final / "generation_config.json").read_text())
    assert kept == document | {"eos_token_id": [2, 7], "use_cache": True, "pad_token_id": 2}


@pytest.mark.parametrize("is_said", [True, False])
def test_a_tokenizer_that_has_changed_is_written_anew(is_said: bool, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama", is_new=False)
    if not is_said:
        document = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({key: document[key] for key in document if key != "vocab_size"}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    export(model_of(tokenizer), tokenizer, tmp_path / "final", dtype=torch.float32, stop_ids=(), chat_template=None,
           card="", weights=None, base=base)  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path / "final").convert_tokens_to_ids("<|new|>") == len(tokenizer) - 1
    assert AutoConfig.from_pretrained(tmp_path / "final").vocab_size == len(tokenizer)
    described = json.loads((tmp_path / "final" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows


def damages() -> list[tuple[str, str, Any]]:
    """File, key and value: 300 ways to spoil a model folder's JSON."""
    values = [None, True, -1, 0, 10**30, 1e400, "x", "", [], {}, [1], {"a": 1}, float("nan"), "1e-5", 3.5]
    keys = {
        "config.json": [
            "model_type", "architectures", "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads",
            "rope_theta", "rope_scaling", "rms_norm_eps", "max_position_embeddings", "torch_dtype", "eos_token_id",
            "tie_word_embeddings",
        ],
        "generation_config.json": ["eos_token_id", "temperature", "max_length"],
        "tokenizer_config.json": ["tokenizer_class", "chat_template", "eos_token", "added_tokens_decoder"],
    }  # fmt: skip
    return [(file, key, value) for file, names in keys.items() for key in names for value in values]


def test_a_spoilt_folder_is_refused_or_works(tmp_path: Path) -> None:
    """Whatever a model folder's files say, it is the user's error or none: never another exception."""
    base = base_of(tmp_path / "base", "llama", is_new=False)
    fates = {"refused": 0, "works": 0}
    for file, key, value in damages():
        before = (base / file).read_text()
        (base / file).write_text(json.dumps(json.loads(before) | {key: value}))
        fates[_fate(base, f"{file}: {key}: {value!r}")] += 1
        (base / file).write_text(before)
    assert sum(fates.values()) == len(damages()) == 300
    assert fates["refused"] >= 100, fates
    assert fates["works"] >= 50, fates


def test_a_stop_token_beyond_all_numbers_of_tokens_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama", is_new=False)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 10**30}))
    with pytest.raises(InputError, match=r"eos_token_id 10+ is no token id"):
        models.inspect(str(base))


FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "config.json",
    "generation_config.json", "model.safetensors.index.json",
)  # fmt: skip
CONTENTS = {
    "empty": b"", "null": b"null", "list": b"[]", "number": b"7", "deep": b"[" * 5000, "long": b"9" * 6000,
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "zeros": b"\0" * 64,
    "half": b'{"a": "\\ud800"}', "not UTF-8": b"\xff\xfe{", "page": b"<html>404</html>",
    "cut": b'{"model": {"vocab": {',
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_bytes_is_refused_or_works(name: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama", is_new=False)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink()
    before = (base / name).read_bytes() if (base / name).exists() else b""
    fates = {"refused": 0, "works": 0}
    for what, content in CONTENTS.items() | {("cut in half", before[: len(before) // 2])}:
        (base / name).write_bytes(content)
        fates[_fate(base, f"{name}: {what}")] += 1
    assert sum(fates.values()) == len(CONTENTS) + 1
    assert name in ("chat_template.jinja", "special_tokens_map.json") or fates["refused"] > 8, fates


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["folder", "loop", "nowhere", "pipe"])
def test_an_entry_that_is_no_file_is_refused_by_name(kind: str, name: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama", is_new=False)
    path = base / name
    path.unlink(missing_ok=True)
    {
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(name),
        "nowhere": lambda: path.symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    for read in (models.inspect, tokenizers.load):
        with pytest.raises(InputError, match=rf"{name}: is no file that can be read; put the file in its place"):
            read(str(base))


def test_what_is_private_in_a_base_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, secret = base_of(tmp_path / "base", "llama", is_new=False), "a word that nobody guesses"
    monkeypatch.setenv("MY_TOKEN", secret)
    private = {
        "use_auth_token": "mine",
        "_name_or_path": "/home/me/secret-project",
        "note": secret,
        "hub": "hf_" + "a" * 20,
    }
    for name in ("config.json", "tokenizer_config.json"):
        document = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**document, **private, "mine": "kept"}))
    final = final_of(base, tmp_path / "final")
    for name in ("config.json", "tokenizer_config.json"):
        kept = json.loads((final / name).read_text())
        assert private.keys() & kept.keys() == set()
        assert kept["mine"] == "kept"
        assert name == "config.json" or "eos_token" in kept


def _fate(base: Path, what: str) -> str:
    try:
        found = models.inspect(str(base))
        tokenizers.load(str(base))
        selftest.choose(models.load(found, device="cpu", dtype=torch.float32))
    except InputError:
        return "refused"
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    return "works"
