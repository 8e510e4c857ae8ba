"""A model is asked in the text that its rows became: said at training, kept in final/, followed by what asks it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_llama
from tiny_tokenizers import CHATML
from typer.testing import CliRunner

import deft
from deft.commands import chat as talking
from deft.commands.cli import app
from deft.core.errors import InputError
from deft.evaluation import generate as generation
from deft.evaluation import prompt_form
from deft.evaluation.prompt_form import PromptForm
from deft.model import load as models

PAIRS = [{"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(4)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"].strip()},
        ]
    }
    for row in PAIRS
]
TEXTS = [{"text": "the cat sat on the mat"}] * 4
RAW, CHAT = "What is 9?", "<|im_start|>user\nWhat is 9?<|im_end|>\n<|im_start|>assistant\n"
SETTINGS = {"max_new_tokens": 4}
SWITCHED = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n' + ('!' if loud else '')")


def train(folder: Path, rows: Any, template: str | None = CHATML, **more: Any) -> deft.Run:
    model = write_llama(folder / "model", chat_template=template)
    given = {"steps": 1, "device": "cpu", "evaluate__generate": SETTINGS, "output": folder / "run", **more}
    return deft.train(model, rows, eval_prompts=[RAW], **given)


def shown_in_training(run: deft.Run) -> str:
    """The text that the evaluation's prompt became."""
    first: str = json.loads((run.folder / "samples.jsonl").read_text().splitlines()[0])["prompt"]
    return first


def asked(folder: Path, *flags: str) -> str:
    done = CliRunner().invoke(app, ["generate", str(folder), RAW, *flags, "--set", "max_new_tokens=1"])
    assert done.exit_code == 0, done.output
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("rows", "render", "text", "first_lines"),
    [
        (PAIRS, "auto", RAW, "not used: rows are learnt as raw text; data.render=chat puts them in it"),
        (PAIRS, "chat", CHAT, "the model's own chat template"),
        (CHATS, "auto", CHAT, "the model's own chat template"),
        (CHATS, "raw", RAW, "not used: rows are learnt as raw text"),
        (TEXTS, "auto", RAW, "not used: rows are learnt as raw text"),
        (TEXTS, "chat", RAW, "not used: rows are learnt as raw text"),
    ],
    ids=["strings", "strings as chats", "chats", "chats as strings", "text", "text, which has no turns"],
)
def test_samples_and_generate_show_the_model_what_its_rows_became(
    rows: Any, render: str, text: str, first_lines: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, rows, data__render=render)
    said = capsys.readouterr().out.splitlines()
    assert f"template: {first_lines}" in said
    form = PromptForm(text == CHAT)
    assert f"evaluate.prompts: {form}" in said
    assert shown_in_training(run) == text
    final = run.folder / "final"
    (answer,) = talking.run_generate(final, [RAW], generate=SETTINGS)
    assert str(form) + ", as in its training" in capsys.readouterr().err
    model, tokenizer = generation.load(final)
    shown = [{"role": "user", "content": RAW}] if text == CHAT else RAW
    assert [answer] == generation.complete(model, tokenizer, [shown], generate=SETTINGS)
    assert f"As in its training, {form}." in (final / "README.md").read_text()


def test_rows_of_both_kinds_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    run = train(tmp_path, [tmp_path / "pairs.jsonl", tmp_path / "chats.jsonl"])
    said = capsys.readouterr().out
    assert (
        f"template: not used for {tmp_path / 'pairs.jsonl'}: learnt as raw text; data.render=chat puts them in it"
        in said
    )
    assert shown_in_training(run) == CHAT


def test_where_there_is_no_template_nothing_is_said_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, PAIRS, template=None)
    assert "template: " not in capsys.readouterr().out
    assert asked(run.folder / "final") == "prompts are raw text, as in its training"


def test_a_flag_overrides_and_what_was_trained_is_said(tmp_path: Path) -> None:
    raw = train(tmp_path / "a", PAIRS).folder / "final"
    chat = train(tmp_path / "b", CHATS).folder / "final"
    in_chat, as_it_is = "each prompt is the user's message in the chat template", "prompts are raw text"
    assert asked(raw) == f"{as_it_is}, as in its training (--chat: otherwise)"
    assert asked(chat) == f"{in_chat}, as in its training (--raw: otherwise)"
    assert asked(raw, "--chat") == f"{in_chat}; in its training {as_it_is}"
    assert asked(chat, "--raw") == f"{as_it_is}; in its training {in_chat}"
    assert asked(raw, "--raw") == f"{as_it_is}, as in its training"


def test_a_folder_without_a_record_is_asked_in_its_chat_template_and_that_is_said(tmp_path: Path) -> None:
    with_template = write_llama(tmp_path / "a", chat_template=CHATML)
    without = write_llama(tmp_path / "b")
    assert asked(with_template) == "each prompt is the user's message in the chat template (--raw: otherwise)"
    assert asked(without) == "prompts are raw text, as there is no chat template"
    with pytest.raises(InputError, match=r"--chat: .* has no chat template"):
        talking.run_generate(without, [RAW], is_chat=True)
    (with_template / prompt_form.FILE).write_text('{"render": "loud"}')
    with pytest.raises(InputError, match=r"deft\.json: not as deft writes it; remove it"):
        talking.run_generate(with_template, [RAW])


def test_chat_says_that_a_model_has_learnt_from_raw_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, is_warned in ((PAIRS, True), (CHATS, False)):
        run = train(tmp_path / str(is_warned), rows)
        monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
        capsys.readouterr()
        talking.run_chat(run.folder / "final", None, SETTINGS)
        said = capsys.readouterr().err
        assert ("warning: this model was trained on raw text" in said) == is_warned
        assert "each prompt is the user's message in the chat template" in said


def test_variables_of_the_template_are_those_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, CHATS, template=SWITCHED, template_kwargs={"loud": True}, data__train_on="all")
    assert shown_in_training(run) == CHAT + "!"
    final = run.folder / "final"
    assert prompt_form.recorded(final) == PromptForm(True, {"loud": True})
    _, tokenizer = generation.load(final)
    text = generation.prompt_text(tokenizer, [{"role": "user", "content": RAW}], {"loud": True})
    assert text == CHAT + "!"
    seen: list[Any] = []
    plain = generation.prompt_text
    monkeypatch.setattr(generation, "prompt_text", lambda *given: (seen.append(plain(*given)), plain(*given))[1])
    talking.run_generate(final, [RAW], generate=SETTINGS)
    monkeypatch.setattr("sys.stdin", io.StringIO(RAW + "\n"))
    talking.run_chat(final, None, SETTINGS)
    assert seen == [CHAT + "!"] * 2
    assert 'in the chat template with {"loud": true}' in capsys.readouterr().err


def test_messages_are_asked_in_a_template_or_refused_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": RAW}]
    model = write_llama(tmp_path / "model")
    with monkeypatch.context() as patched:
        patched.setattr(models, "load", lambda *given, **more: pytest.fail("the model was loaded"))
        with pytest.raises(InputError, match=r"evaluate\.prompts: a prompt made of messages needs a chat template"):
            deft.train(model, PAIRS, eval_prompts=[messages], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = write_llama(tmp_path / "other", chat_template=CHATML)
    given = {"eval_prompts": [messages], "evaluate__generate": SETTINGS, "steps": 1, "device": "cpu"}
    assert shown_in_training(deft.train(model, PAIRS, output=tmp_path / "run", **given)) == CHAT
