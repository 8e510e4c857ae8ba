import re

import pytest

from deft.commands.demo.base import (
    BOS,
    EOS,
    build_tokenizer,
    write_base,
)
from deft.commands.demo.command import VOCAB_SIZE
from deft.commands.demo.data import (
    VALUES,
    DemoData,
    build,
    score,
)


@pytest.fixture(scope="module")
def demo_data() -> DemoData:
    return build(seed=0)


@pytest.fixture(scope="module")
def tokenizer(demo_data):
    return build_tokenizer(demo_data.texts, VOCAB_SIZE)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def said(messages: list[dict[str, str]]) -> set[str]:
    return set().union(*(words(message["content"]) for message in messages))


def asked_about(demo_data: DemoData, questions) -> set[str]:
    return {name for question in questions for name in said(question.messages) & demo_data.facts.keys()}


def test_the_same_seed_gives_the_same_world_and_another_seed_another(demo_data):
    assert build(seed=0) == demo_data
    other = build(seed=1)
    assert other.facts != demo_data.facts
    assert other.texts != demo_data.texts
    assert other.dialogues != demo_data.dialogues


@pytest.mark.parametrize("seed", range(3))
def test_no_heldout_person_is_in_any_dialogue_and_every_taught_one_is(seed):
    demo_data = build(seed)
    heldout, taught = asked_about(demo_data, demo_data.heldout), asked_about(demo_data, demo_data.taught)
    in_dialogues = set().union(*(said(row["messages"]) for row in demo_data.dialogues)) & demo_data.facts.keys()
    assert len(heldout) == 40
    assert not heldout & in_dialogues
    assert taught == in_dialogues == demo_data.facts.keys() - heldout


def test_every_fact_is_told_in_the_texts_and_no_text_tells_a_wrong_one(demo_data):
    kind_of = {value: kind for kind, values in VALUES.items() for value in values}
    told = set()
    for text in demo_data.texts:
        (name,) = words(text) & demo_data.facts.keys()
        stated = {(kind_of[value], value) for value in words(text) & kind_of.keys()}
        assert stated == set(demo_data.facts[name].items())
        told |= {(name, *fact) for fact in stated}
    assert len(told) == len(demo_data.facts) * len(VALUES)


def test_no_text_holds_an_answer_after_a_question(demo_data):
    assert not any("?" in text or "assistant" in text or "user" in text for text in demo_data.texts)


def test_every_question_has_one_right_answer_and_the_dialogues_give_it(demo_data):
    assert len(demo_data.heldout) == 200
    for question in demo_data.heldout + demo_data.taught:
        (name,) = words(question.answer) & demo_data.facts.keys()
        assert said(question.messages) >= {name}
        assert len(words(question.answer) & set(demo_data.facts[name].values())) == 1
        assert score(question.answer, question.answer)
    right = {question.answer for question in demo_data.taught}
    for row in demo_data.dialogues:
        assert {message["content"] for message in row["messages"] if message["role"] == "assistant"} <= right


def test_dialogues_have_one_or_two_turns_with_and_without_a_system_message(demo_data):
    shapes = {"".join(message["role"][0] for message in row["messages"]) for row in demo_data.dialogues}
    assert shapes == {"ua", "uaua", "sua", "suaua"}


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "Mara",
        "Mara lives in Redcliff.",
        "Mara lives in Saltmere and Redcliff.",
        "Mara lives in Saltmere. Mara keeps a pony.",
        "Mara lives in Saltmere with a pony.",
        "Mara lives in Saltmere.\nMara lives in Saltmere.",
        "Olo lives in Saltmere.",
        "Mara and Olo live in Saltmere.",
        "She lives in Saltmere.",
        "Mara lives in Saltmeres.",
        "mara lives in saltmere.",
    ],
)
def test_score_refuses(answer):
    assert not score(answer, "Mara lives in Saltmere.")


@pytest.mark.parametrize(
    "answer", ["Mara lives in Saltmere.", " Mara lives in Saltmere\n", "The home of Mara is in Saltmere."]
)
def test_score_accepts(answer):
    assert score(answer, "Mara lives in Saltmere.")


def test_the_tokenizer_gives_back_every_text_behind_one_bos(demo_data, tokenizer):
    foreign = ["", " ", "Žofie  née\tO'Neill,\r\n 12 %", "日本語 🙂 ABC aBc"]
    for text in demo_data.texts[:200] + foreign:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])
        assert tokenizer.decode(ids[1:]) == text


def test_a_name_is_one_token_and_the_same_one_everywhere(demo_data, tokenizer):
    for name in demo_data.facts:
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(f"{name} met {name}\n{name}"))
        assert ids.count(tokenizer.convert_tokens_to_ids(name)) == 3


def test_the_base_folder_is_small_seeded_and_leaves_the_random_state_alone(tmp_path, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = torch.random.get_rng_state()
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_base(tmp_path / folder, tokenizer, seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc"]
    assert weights[0] == weights[1] != weights[2]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.tie_word_embeddings
    assert 0.4e6 < model.num_parameters() < 1.5e6
    read = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (read.bos_token, read.eos_token, read.chat_template) == (BOS, EOS, None)
    assert read("Mara keeps a pony.").input_ids == tokenizer("Mara keeps a pony.").input_ids
