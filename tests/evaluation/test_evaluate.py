"""Sampled answers: prompts are checked by name, one setting is swept, metrics are one number per answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_writers import PROMPTS, model_of, tokenizer_of

from deft.core.errors import InputError, Problems, UserCodeError
from deft.evaluation import generate as generation
from deft.evaluation.prompts import Prompt
from deft.evaluation.prompts import load as parse_prompts
from deft.evaluation.samples import sample, settings


def lengths(samples: list[str], prompts: list[str], outputs: list[str], **_: Any) -> dict[str, list[float]]:
    return {"length": [len(output) for output in outputs]}


def prompts_of(*texts: str) -> tuple[Prompt, ...]:
    return parse_prompts(texts)


def test_prompts_are_texts_messages_or_objects_with_metadata() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert parse_prompts(["Hi", messages, {"prompt": messages, "answer": 4}, {"prompt": "", "answer": 5}]) == (
        Prompt("Hi", {}),
        Prompt(messages, {}),
        Prompt(messages, {"answer": 4}),
        Prompt("", {"answer": 5}),
    )
    assert parse_prompts([]) == ()


def test_every_bad_prompt_is_named() -> None:
    bad = [
        3,
        {"role": "user", "content": "Hi"},
        {"question": "Hi"},
        {"prompt": "Hi", "outputs": 1},
        [],
        ["Hi"],
        [{"content": "Hi"}],
        {"prompt": [{"role": "user"}]},
        "good",
    ]
    with pytest.raises(Problems) as caught:
        parse_prompts(bad)
    assert [problem.where for problem in caught.value.problems] == [
        "eval_prompts[0]",
        "eval_prompts[1]",
        "eval_prompts[2]",
        "eval_prompts[3].outputs",
        "eval_prompts[4]",
        "eval_prompts[5][0]",
        "eval_prompts[6][0].role",
        "eval_prompts[7].prompt[0].content",
    ]
    with pytest.raises(InputError, match="put it in a list"):
        parse_prompts("Hi")


def test_one_setting_is_swept_and_two_are_not() -> None:
    assert [(s.suffix, s.generate["top_k"]) for s in settings({"top_k": [1, 5]})] == [("@top_k=1", 1), ("@top_k=5", 5)]
    assert [s.generate["max_new_tokens"] for s in settings({"max_new_tokens": (2, 3)})] == [2, 3]
    assert settings({})[0].generate == {"max_new_tokens": 40, "do_sample": False}
    with pytest.raises(InputError, match="temperature and top_p are lists"):
        settings({"temperature": [0.5, 1.0], "top_p": [0.9]})
    with pytest.raises(InputError, match="sweeps nothing"):
        settings({"temperature": []})
    with pytest.raises(Problems, match="did you mean 'temperature'"):
        settings({"temprature": [0.5]})


@pytest.mark.parametrize("key", ["bad_words_ids", "eos_token_id", "suppress_tokens"])
def test_settings_that_are_lists_by_nature_are_not_swept(key: str) -> None:
    value = [[3]] if key == "bad_words_ids" else [3, 4]
    (setting,) = settings({key: value, "temperature": 0.5})
    assert setting.suffix == ""
    assert setting.generate[key] == value
    assert len(settings({key: value, "temperature": [0.5, 1.0]})) == 2


def test_answers_and_metrics_are_those_of_each_prompt() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    result = sample(model, tokenizer, prompts_of(*PROMPTS), {"max_new_tokens": 9}, ["e"], lengths)
    answers = generation.complete(model, tokenizer, PROMPTS, generate={"max_new_tokens": 9}, stop_sequences=["e"])
    assert [(row.prompt, row.output, row.metrics, row.setting) for row in result.rows] == [
        (prompt, answer, {"length": len(answer)}, "") for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    assert result.means == {"metrics/length": sum(map(len, answers)) / len(answers)}


def test_metric_fn_is_given_samples_prompts_outputs_and_metadata() -> None:
    tokenizer = tokenizer_of("bytes")
    given: dict[str, Any] = {}

    def metric(**lists: Any) -> dict[str, Any]:
        given.update(lists)
        return {"right": np.array([1, 0], np.int64), "logp": torch.tensor([0.5, -1.5])}

    messages = [{"role": "user", "content": "A"}]
    prompts = parse_prompts([{"prompt": "The cat", "answer": 4}, {"prompt": messages, "level": "x"}])
    result = sample(model_of(tokenizer), tokenizer, prompts, {"max_new_tokens": 3}, metric_fn=metric)
    assert given["prompts"] == ["The cat", "<s><user>A</s><assistant>"]
    assert given["samples"] == [p + o for p, o in zip(given["prompts"], given["outputs"], strict=True)]
    assert (given["answer"], given["level"]) == ([4, None], [None, "x"])
    assert result.means == {"metrics/right": 0.5, "metrics/logp": -0.5}
    assert result.rows[1].metrics == {"right": 0.0, "logp": -1.5}


def test_a_sweep_names_its_setting_behind_each_metric() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer)
    result = sample(model, tokenizer, prompts_of("The cat", "A"), {"max_new_tokens": [1, 6]}, metric_fn=lengths)
    assert [row.setting for row in result.rows] == ["max_new_tokens=1"] * 2 + ["max_new_tokens=6"] * 2
    assert list(result.means) == ["metrics/length@max_new_tokens=1", "metrics/length@max_new_tokens=6"]
    short, long = result.means.values()
    assert short < long


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0, 2.0], "returned list"),
        ({"reward": [1.0]}, "'reward' has 1 values for 2 samples"),
        ({"reward": 1.0}, "'reward' is float"),
        ({"reward": "ab"}, "'reward' is str"),
        ({"reward": [1.0, None]}, r"'reward'\[1\] is None"),
        ({"reward": [[1.0], [2.0]]}, r"'reward'\[0\] is \[1.0\]"),
    ],
)
def test_what_metric_fn_returns_is_checked(returned: Any, said: str) -> None:
    tokenizer = tokenizer_of("bytes")
    with pytest.raises(InputError, match=f"metric_fn: .*{said}"):
        sample(
            model_of(tokenizer),
            tokenizer,
            prompts_of("The cat", "A"),
            {"max_new_tokens": 2},
            metric_fn=lambda **_: returned,
        )


@pytest.mark.parametrize(
    ("raised", "said"),
    [(ZeroDivisionError("by nought"), "ZeroDivisionError: by nought"), (SystemExit(3), "SystemExit: 3")],
)
def test_what_metric_fn_raises_is_named_as_the_user_s_with_its_traceback(raised: BaseException, said: str) -> None:
    def inner() -> None:
        raise raised

    def metric(**lists: Any) -> dict[str, list[float]]:
        inner()
        return {}

    tokenizer = tokenizer_of("bytes")
    with pytest.raises(UserCodeError) as error:
        sample(model_of(tokenizer), tokenizer, prompts_of("A"), {"max_new_tokens": 1}, metric_fn=metric)
    first, *frames = str(error.value).splitlines()
    assert first == f"metric_fn raised {said}"
    places = [line for line in frames if line.startswith("  File")]
    assert [line.rpartition(" in ")[2] for line in places] == ["metric", "inner"], "the user's frames, and no other"
    assert error.value.exit_code == 2
    assert error.value.__cause__ is raised


def test_sampling_draws_no_random_number_of_training() -> None:
    tokenizer = tokenizer_of("bytes")
    model = model_of(tokenizer).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sample(model, tokenizer, prompts_of(*PROMPTS), {"temperature": 3.0})
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    assert sample(model, tokenizer, prompts_of(*PROMPTS), {"temperature": 3.0}) == first
    assert model.training


def test_no_prompts_give_no_samples() -> None:
    tokenizer = tokenizer_of("bytes")
    result = sample(model_of(tokenizer), tokenizer, (), {}, metric_fn=lengths)
    assert (result.rows, result.means) == ((), {})
