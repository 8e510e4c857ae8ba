"""Text from a model: batched answers are plain transformers' answers, and nothing is changed in passing."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from tiny_writers import PROMPTS, model_of, needs_stories, tokenizer_of

from deft.commands import chat as talking
from deft.core.errors import InputError, Problems
from deft.evaluation import generate as generation
from deft.evaluation.streaming import stream


def plain(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """One prompt alone through transformers, as its documentation shows, then the text behind the prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    eos = model.generation_config.eos_token_id
    stops = eos if isinstance(eos, list) else [eos]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    new = out[0, ids.shape[1] :].tolist()
    while new and new[-1] in stops:
        new.pop()
    shown = tokenizer.decode(ids[0], skip_special_tokens=True)
    whole = tokenizer.decode(ids[0].tolist() + new, skip_special_tokens=True)
    return whole[len(shown) :] if whole.startswith(shown) else tokenizer.decode(new, skip_special_tokens=True)


def shown_ids(model: Any, tokenizer: Any, prompt: Any) -> list[int]:
    """The ids that the model is given for a prompt."""
    seen: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    generation.complete(model, tokenizer, [prompt], generate={"max_new_tokens": 1})
    hook.remove()
    return seen[0][0].tolist()


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("seed", range(4))
def test_batched_greedy_answers_are_those_of_plain_transformers_one_by_one(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "BATCH_PROMPTS", 4)
    tokenizer = tokenizer_of(kind)
    model = model_of(tokenizer, seed=seed)
    answers = generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 24})
    assert answers == [plain(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    assert len({*answers}) > 1


def test_stories_are_told_in_batches_as_one_by_one() -> None:
    model, tokenizer = needs_stories()
    prompts = ["Once upon a time", "Lily", "One day, a big dog", "The sun", "Tom and his mom went to the park. They"]
    answers = generation.complete(model, tokenizer, prompts, generate={"max_new_tokens": 60})
    assert answers == [plain(model, tokenizer.hf, prompt, 60) for prompt in prompts]
    assert answers[0].startswith(", there was a little girl named Lily.")
    assert answers[1].startswith(" ")
    joined = "".join(stream(model, tokenizer, prompts[2], generate={"max_new_tokens": 60}))
    assert joined == answers[2]


def test_a_continuation_keeps_the_space_that_sentencepiece_drops() -> None:
    tokenizer = tokenizer_of("pieces")
    before, new = tokenizer("The cat")["input_ids"], tokenizer(" sat", add_special_tokens=False)["input_ids"]
    new = tokenizer("sat", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(new) == "sat"
    assert generation.continuation(tokenizer, before, new) == " sat"


def test_model_and_tokenizer_are_left_as_they_were_found() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer).train()
    model.model.layers[0].eval()
    tokenizer.padding_side = "right"
    before = [module.training for module in model.modules()], str(model.config), str(model.generation_config)
    state = tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token, tokenizer.padding_side
    generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 3})
    "".join(stream(model, tokenizer, "A", generate={"max_new_tokens": 3}))
    assert before == ([module.training for module in model.modules()], str(model.config), str(model.generation_config))
    assert state == (tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token, tokenizer.padding_side)
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_the_mode_of_training_comes_back_after_an_error() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer).train()
    with pytest.raises(InputError, match="temperature"):
        generation.complete(model, tokenizer, ["A"], generate={"temperature": -1.0})
    assert model.training


def test_bos_stands_once_and_control_tokens_in_a_raw_prompt_stay_text() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    assert shown_ids(model, tokenizer, "The cat") == tokenizer("The cat")["input_ids"]
    ids = shown_ids(model, tokenizer, "<s>The</s>")
    assert (ids.count(1), ids.count(2)) == (1, 0)
    assert tokenizer.decode(ids) == "<s><s>The</s>"
    assert shown_ids(model, tokenizer, "") == [1]


def test_messages_go_through_the_chat_template_with_its_generation_prompt() -> None:
    tokenizer = tokenizer_of("bytes")
    messages = [{"role": "user", "content": "The cat"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert shown_ids(model_of(tokenizer), tokenizer, messages) == expected


def test_messages_need_a_template_and_its_refusal_is_told() -> None:
    with pytest.raises(InputError, match="needs a chat template"):
        generation.prompt_text(tokenizer_of("pieces"), [{"role": "user", "content": "A"}])
    with pytest.raises(InputError, match="no tools"):
        generation.prompt_text(tokenizer_of("bytes"), [{"role": "tool", "content": "A"}])


def test_an_answer_ends_at_a_stop_sequence_and_the_model_stops_there() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    (whole,) = generation.complete(model, tokenizer, ["The cat"], generate={"max_new_tokens": 40})
    stop = whole[6:8]
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    (answer,) = generation.complete(
        model, tokenizer, ["The cat"], generate={"max_new_tokens": 40}, stop_sequences=["never there", stop]
    )
    hook.remove()
    assert answer == whole[: whole.find(stop)].rstrip()
    assert len(calls) < 30


def test_rows_that_stop_early_do_not_change_the_others() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    whole = generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 30})
    stops = [whole[0][3:5], whole[2][8:10]]
    answers = generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 30}, stop_sequences=stops)
    assert answers == [generation.cut(text, stops) for text in whole]
    assert answers != whole


def test_what_prompt_and_answer_make_together_is_no_stop_sequence() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    settings = {"max_new_tokens": 20}
    (whole,) = generation.complete(model, tokenizer, ["The cat"], generate=settings)
    stops = ["t" + whole[:2]]
    assert stops[0] not in whole
    assert generation.complete(model, tokenizer, ["The cat"], generate=settings, stop_sequences=stops) == [whole]
    assert "".join(stream(model, tokenizer, "The cat", generate=settings, stop_sequences=stops)) == whole


@pytest.mark.parametrize("stops", ["\n\n", [""], [3]])
def test_stop_sequences_are_a_list_of_texts(stops: Any) -> None:
    with pytest.raises(InputError, match="stop_sequences"):
        generation.check_stops(stops)


def test_an_answer_ends_at_any_of_the_models_stop_ids() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    (whole,) = generation.complete(model, tokenizer, ["The cat"], generate={"max_new_tokens": 20})
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    fifth = next(index for index in ids[5:] if index not in ids[:5])
    (answer,) = generation.complete(
        model, tokenizer, ["The cat"], generate={"max_new_tokens": 20, "eos_token_id": [2, fifth]}
    )
    assert answer == whole[: whole.find(tokenizer.decode([fifth]))]
    assert answer != whole


def test_stop_ids_are_the_generation_configs_then_the_configs_then_the_tokenizers() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    model.generation_config.eos_token_id = [5, 6]
    model.config.eos_token_id = 7
    assert generation.own_stop_ids(model, tokenizer) == (5, 6)
    model.generation_config.eos_token_id = None
    assert generation.own_stop_ids(model, tokenizer) == (7,)
    model.config.eos_token_id = None
    assert generation.own_stop_ids(model, tokenizer) == (2,)


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 4},
        {"stop_strings": ["never"]},
    ],
)
def test_each_prompt_has_one_answer_whatever_the_models_own_settings_say(settings: dict[str, Any]) -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    assert len(generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 3})) == len(PROMPTS)
    assert isinstance("".join(stream(model, tokenizer, "A", generate={"max_new_tokens": 3})), str)


def test_a_token_that_the_model_has_no_embedding_for_is_named() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    model.resize_token_embeddings(100)
    with pytest.raises(InputError, match=r"prompt: .* is token \d+, and the model has 100 embeddings"):
        generation.complete(model, tokenizer, ["The cat sat"], generate={"max_new_tokens": 3})


def test_sampling_is_asked_for_by_a_temperature_and_repeats_with_the_seed() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    greedy = generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 12})
    torch.manual_seed(1)
    first = generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 12, "temperature": 3.0})
    torch.manual_seed(1)
    second = generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 12, "temperature": 3.0})
    cold = generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 12, "temperature": 0.0})
    assert first == second != greedy
    assert cold == greedy


def test_every_wrong_setting_is_named_with_the_closest_one() -> None:
    with pytest.raises(Problems) as caught:
        generation.resolve({"temprature": 1.0, "max_length": 5, "custom_generate": "x"})
    assert [problem.where for problem in caught.value.problems] == [
        "generate.temprature",
        "generate.max_length",
        "generate.custom_generate",
    ]
    assert "did you mean 'temperature'" in str(caught.value)
    assert "use max_new_tokens" in str(caught.value)


def test_answers_end_where_the_context_does_and_a_prompt_that_fills_it_is_named() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer, context=16)
    model.generation_config.eos_token_id = 0
    room = 16 - len(tokenizer("The cat sat")["input_ids"])
    assert 0 < room < 16
    kept = generation.complete(model, tokenizer, ["The cat sat", "A"], generate={"max_new_tokens": 64})
    assert kept == generation.complete(model, tokenizer, ["The cat sat"], generate={"max_new_tokens": room}) + kept[1:]
    with pytest.raises(InputError, match=r"leaves no room in a context of 16"):
        generation.complete(model, tokenizer, ["The cat sat on the mat, and the dog ran" * 3], generate={})


@pytest.mark.parametrize("seed", range(4))
def test_no_piece_shows_the_beginning_of_a_stop_sequence(seed: int) -> None:
    tokenizer = tokenizer_of("pieces")
    model = model_of(tokenizer, seed=seed)
    settings = {"max_new_tokens": 30}
    (whole,) = generation.complete(model, tokenizer, ["The cat"], generate=settings)
    stops = [whole[12:20], whole[9:15]]
    pieces = stream(model, tokenizer, "The cat", generate=settings, stop_sequences=stops)
    assert "".join(pieces) == generation.cut(whole, stops) != whole


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("stops", [[], ["e", "never there"]])
@pytest.mark.parametrize("seed", range(2))
def test_streamed_pieces_join_to_the_answer(kind: str, stops: list[str], seed: int) -> None:
    tokenizer = tokenizer_of(kind)
    model = model_of(tokenizer, seed=seed)
    settings = {"max_new_tokens": 30}
    whole = generation.complete(model, tokenizer, PROMPTS, generate=settings, stop_sequences=stops)
    for prompt, answer in zip(PROMPTS, whole, strict=True):
        pieces = list(stream(model, tokenizer, prompt, generate=settings, stop_sequences=stops))
        assert "".join(pieces) == answer
        assert all(pieces)


def test_what_fails_while_the_model_writes_is_raised_from_the_stream() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer).train()
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the model broke")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the model broke"):
        list(stream(model, tokenizer, "The cat", generate={"max_new_tokens": 40}))
    assert model.training


def test_a_closed_stream_stops_the_model() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer, context=4096)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    threads = threading.active_count()
    settings = {"max_new_tokens": 3000, "min_new_tokens": 3000}
    pieces = stream(model, tokenizer, "The cat", generate=settings)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert len(calls) < 2000
    assert threading.active_count() == threads


def test_chat_sends_its_history_through_the_template() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    written: list[str] = []
    lines = ["The cat\n", "\n", "A\n", "/reset\n", "The dog\n", "/quit\n", "never\n"]
    settings = {"max_new_tokens": 4}
    talking.chat(model, tokenizer, lines, written.append, system="Sit.", generate=settings)

    def answer(*messages: tuple[str, str]) -> str:
        prompt = [{"role": role, "content": content} for role, content in (("system", "Sit."), *messages)]
        return generation.complete(model, tokenizer, [prompt], generate=settings)[0].strip()

    first = answer(("user", "The cat"))
    second = answer(("user", "The cat"), ("assistant", first), ("user", "A"))
    answers = [text.strip() for text in "".join(written).split("\n") if text.strip()]
    assert "\n" not in first + second
    assert answers == [text for text in (first, second, answer(("user", "The dog"))) if text]


def test_a_message_that_does_not_fit_is_left_out_of_the_chat() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer, context=64)
    written: list[str] = []
    talking.chat(model, tokenizer, ["long " * 200, "A"], written.append, generate={"max_new_tokens": 2})
    assert "leaves no room" in written[0]
    assert "leaves no room" not in "".join(written[1:])


def test_a_model_without_a_template_cannot_chat() -> None:
    tokenizer = tokenizer_of("pieces")
    with pytest.raises(InputError, match="deft generate"):
        talking.chat(model_of(tokenizer), tokenizer, ["A"], print, generate={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tokenizer_of("bytes")
    model_of(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_generate_writes_what_it_returns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"max_new_tokens": 5}
    answers = talking.run_generate(folder, ["The cat", "A\n\nB"], is_chat=False, generate=settings)
    assert capsys.readouterr().out == f"--- The cat\n{answers[0]}\n--- A\n{answers[1]}\n"
    (one,) = talking.run_generate(folder, ["The cat"], is_chat=False, generate=settings)
    assert capsys.readouterr().out == one + "\n"
    assert one == answers[0]


def test_a_prompt_goes_through_the_template_where_there_is_one(folder: Path) -> None:
    settings = {"max_new_tokens": 9}
    chat, raw = (talking.run_generate(folder, ["The cat"], is_chat=each, generate=settings) for each in (None, False))
    model, tokenizer = generation.load(folder)
    messages = [{"role": "user", "content": "The cat"}]
    assert chat == generation.complete(model, tokenizer, [messages], generate=settings) != raw
    (folder / "chat_template.jinja").unlink()
    assert talking.run_generate(folder, ["The cat"], generate=settings) == raw


def test_chat_reads_a_pipe_to_its_end(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat\nA\n"))
    talking.run_chat(folder, None, {"max_new_tokens": 4})
    assert capsys.readouterr().out.count("\n") >= 2


def test_what_is_not_a_model_is_named_with_what_to_do(tmp_path: Path, folder: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            generation.load(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    assert "no config.json" in message(tmp_path / "run")
    folder.rename(tmp_path / "run" / "final")
    assert f"its model is {tmp_path / 'run' / 'final'}" in message(tmp_path / "run")
    final = tmp_path / "run" / "final"
    weights = (final / "model.safetensors").read_bytes()
    (final / "model.safetensors").write_bytes(weights[:1000])
    assert "is cut off inside its header" in message(final)
    (final / "model.safetensors").unlink()
    tensors = {name: tensor for name, tensor in load(weights).items() if name != "model.norm.weight"}
    save_file(tensors, final / "model.safetensors", metadata={"format": "pt"})
    assert "1 weight is not in its files, model.norm.weight first" in message(final)
    (final / "model.safetensors").rename(final / "pytorch_model.bin")
    assert "a pickle can run code" in message(final)
    (final / "model.safetensors").write_bytes(weights)
    (final / "config.json").write_text('{"model_type": "unheard_of", "auto_map": {"AutoModelForCausalLM": "evil.M"}}')
    (final / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    message(final)
    assert not (tmp_path / "canary").exists()
