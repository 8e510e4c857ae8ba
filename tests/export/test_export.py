"""Law 10: plain transformers gives the exported model the same weights, logits, ids, text and stop tokens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_writers import TEMPLATE, model_of, needs_stories, tokenizer_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from deft.core import files
from deft.core.errors import DiskError, InputError
from deft.export.card import model_card
from deft.export.folder import export, verify
from deft.export.weights import ExportError
from deft.model import attention

MESSAGES = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": "sat"}]
ROWS = [[1, 20, 21, 22, 23, 24], [1, 30], [1, *range(10, 60)]]


def masters(model: Any, seed: int = 7) -> dict[str, torch.Tensor]:
    """fp32 masters beside which the model's own weights are the rounded ones."""
    torch.manual_seed(seed)
    return {name: p.detach().float() * (1 + 1e-4 * torch.rand(p.shape)) for name, p in model.named_parameters()}


def write(model: Any, tokenizer: Any, folder: Path, **changed: Any) -> Path:
    options = {"dtype": torch.float32, "stop_ids": (), "chat_template": None, "card": "# card\n", "weights": None}
    export(model, tokenizer, folder, **(options | changed))
    return folder


def snapshot(model: Any, tokenizer: Any) -> tuple[Any, ...]:
    return (
        {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()},
        str(model.config),
        model.config._attn_implementation,
        str(model.generation_config),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
    )


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    weights = all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before[0].values(), after[0].values(), strict=True)
    )
    return weights and before[1:] == after[1:]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reloaded_model_is_the_trained_one(kind: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    model = model_of(tokenizer, tied=tied, spread=0.1)
    weights = masters(model)
    before = snapshot(model, tokenizer)
    folder = write(model, tokenizer, tmp_path / "final", dtype=dtype, stop_ids=[5], weights=weights)
    model.load_state_dict(weights, strict=False)
    check = verify(folder, model, tokenizer, ROWS, MESSAGES, weights=weights, stop_ids=[5])
    model.load_state_dict({name: tensor for name, (_, tensor) in before[0].items()})
    assert same(before, snapshot(model, tokenizer))
    assert (check.tensors, check.rows) == (len(weights), len(ROWS))
    assert check.parameters == sum(tensor.numel() for tensor in weights.values())
    assert check.stop_ids == (2, 5)
    assert check.dtype == str(dtype).removeprefix("torch.")
    assert check.template_compared == (kind == "bytes")
    assert check.largest_error <= 1e-6
    assert (check.served_error == 0) == (dtype == torch.float32)
    assert check.served_error <= 3e-2
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118  not a dict
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118


def in_bf16(model: Any) -> Any:
    """Parameters only: `model.to` would round the frequencies of the rotary embedding too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def test_the_models_own_weights_are_written_where_there_are_no_masters(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    model = in_bf16(model_of(tokenizer))
    folder = write(model, tokenizer, tmp_path / "final", dtype=torch.bfloat16)
    check = verify(folder, model, tokenizer, ROWS, None)
    assert (check.served_error, check.template_compared) == (0.0, False)
    assert check.largest_error <= 1e-6


def test_a_model_that_was_trained_with_rounded_positions_is_not_what_is_served(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer, spread=0.1).to(torch.bfloat16)
    folder = write(model, tokenizer, tmp_path / "final", dtype=torch.bfloat16)
    with pytest.raises(ExportError, match=r"rotary_emb\.inv_freq: .* differs"):
        verify(folder, model, tokenizer, ROWS, None)


def test_stories_survive_the_export(tmp_path: Path) -> None:
    model, tokenizer = needs_stories()
    rows = [tokenizer.hf("Once upon a time, there was a little girl named Lily.")["input_ids"]]
    for dtype in (torch.float32, torch.bfloat16):
        folder = write(model, tokenizer, tmp_path / str(dtype), dtype=dtype, chat_template=TEMPLATE)
        check = verify(folder, model, tokenizer, rows, MESSAGES, chat_template=TEMPLATE)
        assert check.stop_ids == (1, 2)
        assert check.template_compared
        assert check.largest_error <= 1e-6
        assert check.served_error <= 3e-2


@pytest.mark.parametrize("name", ["gpt2", "minimind", "mistral-v1", "mistral-v3", "qwen2.5"])
def test_real_tokenizers_survive_the_export(name: str, tmp_path: Path) -> None:
    if not (CORPUS / "tokenizers" / name).is_dir():
        pytest.skip("no corpus")
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizers" / name)
    model = model_of(tokenizer)
    folder = write(model, tokenizer, tmp_path / "final")
    assert verify(folder, model, tokenizer, ROWS, MESSAGES).texts == 4 + len(ROWS)


def test_another_architecture_with_biases_and_absolute_positions(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).eval()
    model.generation_config.eos_token_id = 2
    folder = write(model, tokenizer, tmp_path / "final", dtype=torch.bfloat16)
    assert verify(folder, model, tokenizer, [ROWS[0]], None).tensors == 28


def test_experts_are_written_as_the_base_has_them(tmp_path: Path) -> None:
    """transformers fuses the experts on loading; the file has them one by one."""
    tokenizer = tokenizer_of("bytes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=len(tokenizer), num_hidden_layers=2, num_local_experts=4, eos_token_id=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder = write(model, tokenizer, tmp_path / "final", dtype=torch.bfloat16)
    assert verify(folder, model, tokenizer, ROWS, None).largest_error <= 1e-6
    with (
        safe_open(tmp_path / "base" / "model.safetensors", "pt") as base,
        safe_open(folder / "model.safetensors", "pt") as final,
    ):
        assert set(base.keys()) == set(final.keys())
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in final.keys()  # noqa: SIM118


def test_nothing_of_training_is_in_the_configs(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer).train()
    model.config.use_cache = False
    model.generation_config.use_cache = False
    model.set_attn_implementation(attention.NAME)
    tokenizer("The cat sat on the mat", truncation=True, max_length=3)
    before = snapshot(model, tokenizer)
    folder = write(model, tokenizer, tmp_path / "final", dtype=torch.bfloat16)
    assert same(before, snapshot(model, tokenizer))
    assert model.training
    config = json.loads((folder / "config.json").read_text())
    assert (config["use_cache"], config["dtype"], config["architectures"]) == (True, "bfloat16", ["LlamaForCausalLM"])
    assert "deft" not in (folder / "config.json").read_text()
    assert not [key for key in config if "attn_impl" in key]
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is None
    assert json.loads((folder / "generation_config.json").read_text()).get("use_cache", True)
    assert (folder / "README.md").read_text() == "# card\n"
    assert AutoModelForCausalLM.from_pretrained(folder).config._attn_implementation == "sdpa"


def test_the_chat_template_travels_and_the_tokenizer_keeps_its_own(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("pieces")
    folder = write(model_of(tokenizer), tokenizer, tmp_path / "final", chat_template=TEMPLATE)
    assert tokenizer.chat_template is None
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


def test_stop_ids_join_the_models_own_and_a_pad_token_is_set(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("pieces")
    model = model_of(tokenizer)
    model.generation_config.eos_token_id = [2, 9]
    folder = write(model, tokenizer, tmp_path / "final", stop_ids=[9, 7])
    written = json.loads((folder / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == ([2, 9, 7], 2)
    assert verify(folder, model, tokenizer, ROWS, None, stop_ids=[9, 7]).stop_ids == (2, 9, 7)
    with pytest.raises(ExportError, match=r"stop ids \[11\]"):
        verify(folder, model, tokenizer, ROWS, None, stop_ids=[11])


def test_sampling_flags_that_transformers_refuses_to_save_are_dropped(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6
    model.generation_config.output_attentions = True
    folder = write(model, tokenizer, tmp_path / "greedy")
    assert "temperature" not in (folder / "generation_config.json").read_text()
    model.generation_config.do_sample = True
    folder = write(model, tokenizer, tmp_path / "sampled")
    written = json.loads((folder / "generation_config.json").read_text())
    assert (written["temperature"], written["top_p"], written["do_sample"]) == (0.9, 0.6, True)
    assert model.generation_config.output_attentions


def flip_a_weight(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    bits = weight[3].view(torch.int32)
    bits[4] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 2048"


def untie(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    change(folder, "config.json", lambda config: config | {"tie_word_embeddings": False})
    return "tied in memory"


def drop_a_weight(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "missing keys"


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    (folder / name).write_text(json.dumps(edit(json.loads((folder / name).read_text()))))


def change_the_positions(folder: Path) -> str:
    parameters = {"rope_type": "default", "rope_theta": 7.0}
    change(folder, "config.json", lambda config: config | {"rope_parameters": parameters})
    return r"rotary_emb\.inv_freq: .* differs"


def change_the_activation(folder: Path) -> str:
    change(folder, "config.json", lambda config: config | {"hidden_act": "gelu"})
    return "row 0: .* logits differ"


def change_the_tokenizer(folder: Path) -> str:
    def edit(state: dict[str, Any]) -> dict[str, Any]:
        state["model"]["merges"] = state["model"]["merges"][5:]
        return state

    change(folder, "tokenizer.json", edit)
    return "other ids"


def drop_bos(folder: Path) -> str:
    change(folder, "tokenizer.json", lambda state: state | {"post_processor": None})
    return "other ids"


def change_the_template(folder: Path) -> str:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<assistant>", "<assistant> "))
    return "another chat template"


def drop_the_stop_ids(folder: Path) -> str:
    change(folder, "generation_config.json", lambda config: config | {"eos_token_id": 5})
    return r"stop ids \[2\]"


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_weight,
        untie,
        drop_a_weight,
        change_the_positions,
        change_the_activation,
        change_the_tokenizer,
        drop_bos,
        change_the_template,
        drop_the_stop_ids,
    ],
)
def test_whatever_differs_is_named(damage: Callable[[Path], str], tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    folder = write(model, tokenizer, tmp_path / "final")
    verify(folder, model, tokenizer, ROWS, MESSAGES)
    expected = damage(folder)
    with pytest.raises(ExportError, match=expected):
        verify(folder, model, tokenizer, ROWS, MESSAGES)


def test_a_model_that_moved_on_after_the_export_is_not_the_exported_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    folder = write(model, tokenizer, tmp_path / "final")
    with torch.no_grad():
        model.model.norm.weight[0] += 0.25
    with pytest.raises(ExportError, match=r"model\.norm\.weight: 1 of 32"):
        verify(folder, model, tokenizer, ROWS, MESSAGES)


def test_masters_that_are_not_the_models_are_named(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    in_bf16(model)
    folder = write(model, tokenizer, tmp_path / "final", dtype=torch.bfloat16, weights=weights)
    verify(folder, model, tokenizer, ROWS, None, weights=weights)
    weights["model.norm.weight"][3] *= 1.02
    folder = write(model, tokenizer, tmp_path / "other", dtype=torch.bfloat16, weights=weights)
    with pytest.raises(ExportError, match=r"model\.norm\.weight: 1 of 32 masters"):
        verify(folder, model, tokenizer, ROWS, None, weights=weights)


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    (tmp_path / "final").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write(model_of(tokenizer), tokenizer, tmp_path / "final")
    assert list(tmp_path.iterdir()) == [tmp_path / "final"]
    assert not list((tmp_path / "final").iterdir())


def test_weights_of_another_shape_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    with pytest.raises(ExportError, match=r"model\.norm\.weight: weights of shape \(3,\)"):
        write(model_of(tokenizer), tokenizer, tmp_path / "final", weights={"model.norm.weight": torch.ones(3)})
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file/final: cannot be written"):
        write(model_of(tokenizer), tokenizer, tmp_path / "file" / "final")


CHILD = """
import resource, signal, sys, time
from pathlib import Path
sys.path[:0] = {tests!r}
from tiny_writers import model_of, tokenizer_of
from test_export import write
from deft.core import files
from deft.core.errors import DiskError
from deft.export import folder as room
{before}
try:
    write(model_of(tokenizer_of("bytes")), tokenizer_of("bytes"), Path({folder!r}))
except DiskError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def child(folder: Path, before: str) -> list[str]:
    here = Path(__file__).parent
    tests = [str(here), str(here.parent)]
    code = CHILD.format(tests=tests, folder=str(folder), before=before)
    return [sys.executable, "-c", code]


FULL = """
def fill(*_, bytes=2000):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))

def then_fill(write):
    return lambda *arguments: (write(*arguments), fill())
"""
FILLED_BEFORE = {
    "config.json": "fill(bytes=200)",
    "model.safetensors": "room._write_configs = then_fill(room._write_configs)",
    "tokenizer.json": "room.write = then_fill(room.write)",
}


@pytest.mark.parametrize("file", FILLED_BEFORE)
def test_a_full_disk_is_told_and_leaves_nothing(file: str, tmp_path: Path) -> None:
    """No file may grow beyond some size from some point on: Python's, safetensors' and tokenizers' own errors."""
    code = child(tmp_path / "final", FULL + FILLED_BEFORE[file])
    ended = subprocess.run(code, capture_output=True, text=True, check=False)
    assert ended.returncode == DiskError.exit_code, ended.stderr
    assert f"{tmp_path / 'final'}: cannot be written" in ended.stdout
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_no_folder_of_the_final_name(tmp_path: Path) -> None:
    """Killed while the files are synced: all are written, none is trusted yet."""
    slow = "files.Disk.sync = lambda disk, file: (print('syncing', flush=True), time.sleep(60))"
    process = subprocess.Popen(child(tmp_path / "final", slow), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "syncing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".final.")
    (tmp_path / ".final.notes").mkdir()
    assert files.sweep(tmp_path) == [left]
    write(model_of(tokenizer_of("bytes")), tokenizer_of("bytes"), tmp_path / "final")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".final.notes", "final"]


def test_a_kill_at_any_moment_leaves_all_or_nothing(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    for index, delay in enumerate((0.0, 0.004, 0.008, 0.012, 0.016, 0.02)):
        folder = tmp_path / str(index) / "final"
        process = os.fork()
        if process == 0:
            write(model, tokenizer, folder)
            os._exit(0)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if folder.exists():
            verify(folder, model, tokenizer, ROWS, MESSAGES)


def test_a_card_says_what_is_known() -> None:
    card = model_card(
        {
            "name": "gsm8k",
            "base_model": "/home/somebody/models/base",
            "data": [{"path": "/home/somebody/train.jsonl", "rows": 7473}],
            "tokens": 1000,
            "target_tokens": 250,
            "hyperparameters": {"optimizer.lr": 1e-5, "a|b": "x"},
            "versions": {"torch": "2.13.0"},
        }
    )
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "somebody" not in card
    assert "| train.jsonl | 7473 |" in card
    assert "250 of 1,000 tokens (25.0%) were learnt." in card
    assert "| optimizer.lr | 1e-05 |\n| a\\|b | x |" in card
    assert 'AutoModelForCausalLM.from_pretrained("gsm8k")' in card
    assert "reference model" in card
