"""A model folder is read, or refused in one line that says what, where and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Phi3Config

from deft.core.errors import InputError
from deft.model.load import Base, inspect, load
from deft.model.selftest import choose


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build("llama")
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_config_alone_says_what_a_model_is(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert inspect(str(folder), needs_weights=False) == Base(
        path=str(folder),
        model_type="llama",
        vocab_size=VOCABULARY,
        max_positions=64,
        dtype="float32",
        is_tied=False,
        stop_ids=(2, 7),
    )


@pytest.mark.parametrize(
    ("name", "max_positions", "is_tied"), [("gpt2", 64, True), ("bloom", None, True), ("opt", 64, True)]
)
def test_other_configs_name_things_differently(name: str, max_positions: int, is_tied: bool, tmp_path: Path) -> None:
    build(name, torch.bfloat16).save_pretrained(tmp_path)
    base = inspect(str(tmp_path))
    assert (base.vocab_size, base.max_positions, base.is_tied) == (VOCABULARY, max_positions, is_tied)
    assert base.dtype == "bfloat16"
    assert base.stop_ids == (2,)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_comes_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    saved = build(name)
    saved.save_pretrained(tmp_path)
    model = load(inspect(str(tmp_path)), device="cpu", dtype=torch.float32)
    assert not model.training
    loaded = model.state_dict()
    assert loaded.keys() == saved.state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in saved.state_dict().items())


def test_the_dtype_is_the_one_asked_for(folder: Path) -> None:
    model = load(inspect(str(folder)), device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: there is no such folder; name a model folder or a hub id"):
        inspect(str(tmp_path / "nowhere"))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        InputError, match=r"not a model folder: it has no config\.json, but notes\.txt; name the folder"
    ):
        inspect(str(tmp_path))


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled \(pytorch_model\.bin\), and a pickle can run code; save it with"):
        inspect(str(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"it has no weights; save it with"):
        inspect(str(folder))


def test_an_unknown_architecture(folder: Path) -> None:
    edit_config(folder, model_type="llamarama")
    with pytest.raises(InputError, match=r"names no architecture that this transformers knows; upgrade transformers"):
        inspect(str(folder))


def test_a_model_that_brings_its_own_code(folder: Path) -> None:
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(InputError, match=r"it brings its own code, which is not run"):
        inspect(str(folder))


def test_a_model_that_writes_no_text(folder: Path) -> None:
    edit_config(folder, model_type="clip", architectures=["CLIPModel"])
    with pytest.raises(InputError, match=r"clip is not a causal language model"):
        inspect(str(folder))


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"it cannot be loaded: .*config"):
        inspect(str(folder))


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: has [\d,]+ bytes, its header says [\d,]+: it is cut"):
        inspect(str(folder))


def test_missing_weights_are_not_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weight is not in its files, model\.layers\.1\.mlp\.up_proj\.weight first"):
        inspect(str(folder))


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)
    with pytest.raises(InputError, match=r"model: it cannot be loaded: 6 weights are of another shape"):
        inspect(str(folder))


def test_weights_without_a_place_are_named_and_kept(folder: Path) -> None:
    assert inspect(str(folder)).notes == ()
    weights = load_file(folder / "model.safetensors") | {"model.layers.2.mtp": torch.ones(3)}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old files have it
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    base = inspect(str(folder))
    assert base.left_over == ("model.layers.2.mtp",)
    assert "1 weight of its files have no place in llama" in base.notes[0]


def test_a_pointer_of_git_lfs_and_a_missing_shard_are_told_apart(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="is a pointer of git-lfs, not the weights; run git lfs pull"):
        inspect(str(folder))
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert inspect(str(folder)).dtype == "float32"
    shards[1].unlink()
    with pytest.raises(InputError, match=rf"{shards[1].name}: cannot be read \(No such file"):
        inspect(str(folder))


@pytest.mark.parametrize(("said", "stored"), [(None, "bfloat16"), ("float32", "bfloat16")])
def test_the_dtype_is_that_of_the_weights(said: str | None, stored: str, tmp_path: Path) -> None:
    build("llama", getattr(torch, stored)).save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=said)
    base = inspect(str(tmp_path))
    assert base.dtype == stored
    assert load(base, device="cpu", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": VOCABULARY}, f"pad_token_id {VOCABULARY} is past the vocabulary"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"its weights are quantized \(gptq\)"),
        ({"dtype": "auto"}, "dtype 'auto' is none of torch's; take it out"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1; say how many tokens"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings is '64'|it cannot be loaded"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder, not a causal language model"),
        ({"rms_norm_eps": None}, "config.json|it cannot be loaded"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_rows_are_read(
    changes: dict[str, object], message: str, folder: Path
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        inspect(str(folder))


def test_an_attention_in_the_config_is_not_looked_for(folder: Path) -> None:
    edit_config(folder, _attn_implementation="flash_attention_2")
    assert load(inspect(str(folder)), device="cpu", dtype=torch.float32).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(value: float, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7, 3:] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight has 29 values that are not finite, in row 7 first"):
        load(inspect(str(folder)), device="cpu", dtype=torch.float32)


def test_a_forward_pass_that_changes_weights_is_refused() -> None:
    model = build("llama")

    def change(module: torch.nn.Module, inputs: object, output: object) -> None:
        with torch.no_grad():
            module.get_parameter("weight")[0, 0] += 1e-6

    model.model.layers[1].mlp.down_proj.register_forward_hook(change)
    with pytest.raises(InputError, match=r"its forward pass changes its weights \(model\.layers\.1\.mlp\.down_proj"):
        choose(model)


def test_positions_that_follow_the_longest_text_are_not_packed() -> None:
    """Phi-3's longrope takes other frequencies for all documents of a batch once one of them is long."""
    rope = {"rope_type": "longrope", "short_factor": [1.1] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=64, pad_token_id=0,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
    )  # fmt: skip
    causal_lm = choose(AutoModelForCausalLM.from_config(config).eval())
    assert causal_lm.mode == "alone"
    assert "longest text of a batch" in causal_lm.note


def test_weights_of_several_dtypes_are_told(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    base = inspect(str(folder))
    assert (base.dtype, base.dtypes) == ("float32", ("bfloat16", "float32"))
    assert "lie in bfloat16 and float32; final/ has all of them in float32" in base.notes[0]


def test_a_header_that_calls_weights_whole_numbers_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(InputError, match=r"is I32 in model\.safetensors, and the model computes with floats"):
        inspect(str(folder))


def test_a_generation_config_that_cannot_be_read_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"its generation_config\.json cannot be read"):
        inspect(str(folder))


def test_a_stop_token_past_the_vocabulary_is_told(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, VOCABULARY]}))
    assert f"eos_token_id {VOCABULARY} is past its vocabulary" in inspect(str(folder)).notes[0]


@pytest.mark.parametrize("value", [{"top_p": "0.9"}, {"temperature": "1e-1"}, {"top_k": "50"}, {"min_p": ".1"}])
def test_a_number_that_is_text_in_a_generation_config_is_refused(folder: Path, value: dict[str, str]) -> None:
    for more in ({}, {"do_sample": True}):
        (folder / "generation_config.json").write_text(json.dumps({**value, **more}))
        with pytest.raises(InputError, match=rf"{next(iter(value))} is the text '.*take the quotes away"):
            inspect(str(folder))


def test_embeddings_that_are_all_zero_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="its embeddings are all 0"):
        load(inspect(str(folder)), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_key_with_two_values_is_refused(name: str, folder: Path) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("{", '{"eos_token_id": 5, ', 1))
    with pytest.raises(InputError, match=rf"{name}: eos_token_id stands twice, with two values"):
        inspect(str(folder))


def test_shards_that_hold_others_than_their_index_says_are_refused(folder: Path) -> None:
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = list(index["weight_map"].values())
    name, right = next(pair for pair in index["weight_map"].items() if places.count(pair[1]) > 1)
    shards = sorted(set(places))
    wrong = next(each for each in shards if each != right)
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], name: wrong}}))
    with pytest.raises(InputError, match=rf"has {name}, which model\.safetensors\.index\.json says is in {wrong}"):
        inspect(str(folder))
    path.write_text(json.dumps(index))
    first, second = shards[:2]
    tensors = load_file(folder / first)
    save_file(load_file(folder / second) | tensors, folder / second, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{second}: has {min(tensors)}, which {first} has as well"):
        inspect(str(folder))


def test_a_head_of_its_own_beside_a_config_that_ties_it_is_refused(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"a head that is not its embeddings, and config\.json ties the two"):
        load(inspect(str(folder)), device="cpu", dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    assert load(inspect(str(folder)), device="cpu", dtype=torch.float32).lm_head.weight is not None
