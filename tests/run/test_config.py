"""The configuration: every wrong key or value in one error, with the closest right name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deft.core.errors import InputError, Problems
from deft.run import config

MINIMAL = ["model=m", "data=a.jsonl"]


def problems(*overrides: str) -> list[str]:
    with pytest.raises(Problems) as error:
        config.load(None, [*MINIMAL, *overrides])
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize("more", [["optimizer.lr=0.01", "loss.normalize=examples", "schedule.warmup=0"], []])
def test_a_name_alone_is_that_of_its_section(more: list[str]) -> None:
    """In any order, beside other keys of the section, and in Python."""
    names = ["optimizer=sgd", "loss=kl", "schedule=constant", "adapter=lora"]
    for given in ([*names, *more], [*more, *names]):
        made = config.load(None, [*MINIMAL, *given])
        assert (made.optimizer.name, made.loss.name, made.schedule.name) == ("sgd", "kl", "constant")
        assert made.adapter is not None
        assert made.optimizer.lr == (0.01 if more else 2e-4)
    made = config.make({"model": "m", "data": {"train": "a"}, "optimizer": "lion"})
    assert made.optimizer.name == "lion"


def test_two_keys_are_enough() -> None:
    made = config.load(None, MINIMAL)
    assert (made.model, made.data.train[0].path, made.batch.examples) == ("m", "a.jsonl", 32)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "learning_rate: unknown key; deft calls it optimizer.lr"),
        ("per_device_train_batch_size=1", "deft calls it batch.examples"),
        ("optimizer.learning_rate=1", "deft calls it optimizer.lr"),
        ("epoch=1", "did you mean 'epochs'?"),
        ("optimzer.lr=1", "did you mean 'optimizer'?"),
        ("data.trian=a", "did you mean 'data.train'?"),
        ("schedule.name=cosin", "did you mean 'cosine'?"),
        ("epochs=two", "epochs: should be a valid integer"),
        ("epochs=0", "epochs: should be greater than or equal to 1, not 0"),
        ("data.eval=1.5", "a share is at least 0 and below 1"),
        ("batch={examples: 2, tokens: 3}", "name examples or tokens, one of the two"),
        ("microbatch_tokens=0", "at least 1, or auto"),
    ],
)
def test_a_wrong_key_or_value_names_the_right_one(override: str, message: str) -> None:
    assert any(message in problem for problem in problems(override)), problems(override)


def test_all_problems_come_at_once() -> None:
    assert len(problems("learning_rate=1", "epochs=two", "schedule.name=cosin", "foo=1")) == 4


def test_every_name_that_others_use_leads_to_a_key_of_ours() -> None:
    known = set(config.keys())
    for theirs, ours in config.OTHER_NAMES.items():
        assert ours.partition(" (")[0] in known, theirs
        assert theirs not in known


def test_scientific_notation_is_a_number_as_yaml_does_not_read_it(tmp_path: Path) -> None:
    assert isinstance(yaml.safe_load("1e-5"), str)
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: {train: a.jsonl, eval: 1e-2}\noptimizer: {lr: 1e-5}\n")
    made = config.load(str(file))
    assert (made.optimizer.lr, made.data.eval) == (1e-5, 0.01)


def test_a_file_overrides_and_a_saved_config_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "m"\nepochs = 2\n[data]\ntrain = ["a.jsonl", "b.jsonl"]\n')
    made = config.load(str(file), ["optimizer.betas=[0.8, 0.9]", "data.train_on=all"])
    assert (made.epochs, len(made.data.train), made.optimizer.betas) == (2, 2, (0.8, 0.9))
    saved = tmp_path / "config.yaml"
    saved.write_text(config.as_yaml(made))
    assert config.load(str(saved)) == made


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "just text"])
def test_a_file_that_is_no_configuration_is_said(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=r"run\.yaml"):
        config.load(str(file))


def test_a_missing_file_and_a_bare_word_are_said() -> None:
    with pytest.raises(InputError, match="No such file"):
        config.load("nothing.yaml")
    with pytest.raises(InputError, match="neither a file nor key=value"):
        config.load(None, ["epochs"])


def test_a_config_cannot_be_changed() -> None:
    made = config.load(None, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        made.epochs = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    "override",
    [
        *(f"optimizer.lr={value}" for value in (".inf", ".nan", "1e39", "1e-50", "inf", str(10**400))),
        *("optimizer.betas=[2,3]", "optimizer.betas=[.nan,0.9]", "optimizer.eps=.inf", "optimizer.weight_decay=.inf"),
        *("optimizer.options={momentum: .nan}", "optimizer.rates={a: .inf}", "loss.options={epsilon: .nan}"),
        *("schedule.warmup=.inf", "adapter={name: lora, alpha: .inf}", "evaluate.generate={temperature: .inf}"),
        *(
            "data=[{path: a, loss_weight: .nan}]",
            "data=[{path: a, times: .inf}]",
            "optimizer.clip=.nan",
            "data.eval=.nan",
        ),
        "template_kwargs={a: {b: [1, .nan]}}",
    ],
)
def test_a_number_that_is_not_finite_is_refused(override: str) -> None:
    with pytest.raises(Problems) as error:
        config.load(None, [*MINIMAL[:1], *(MINIMAL[1:] if not override.startswith("data=") else ()), override])
    key = override.partition("=")[0]
    assert all(problem.where.startswith(key.partition("[")[0]) for problem in error.value.problems), error.value


@pytest.mark.parametrize(
    "value",
    ["2026-11-30", "007", "1e3", "12:30", "yes", "off", "1_000", "0x10", "2026", "a #b", "#b", "a: b #c", "&a", "- a"],
)
def test_a_name_is_the_text_that_was_typed(value: str) -> None:
    made = config.load(None, [*MINIMAL, f"output={value}", f"template={value}", f"model={value}"][1:])
    assert (made.output, made.template, made.model) == (value, value, value)


@pytest.mark.parametrize("value", ["a #1.jsonl", "#1.jsonl", "a: b #c", "'a' #1"])
def test_nothing_on_a_command_line_is_a_comment(value: str) -> None:
    made = config.load(None, [MINIMAL[0], f"data.train={value}", f"data.eval={value}"])
    assert [source.path for source in (*made.data.train, *made.data.eval)] == [value, value]  # type: ignore[misc]
    assert config.setting("data.train=['a #1', b]") == ("data.train", ["a #1", "b"])
    with pytest.raises(Problems, match=r"seed: .* not '1 #2'"):
        config.load(None, [*MINIMAL, "seed=1 #2"])


@pytest.mark.parametrize("value", ["1:30", "1:30.5", "0x10", "0b11", "0o17"])
def test_a_number_to_another_base_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"model: m\ndata: a\noptimizer: {{lr: {value}}}\n")
    for given in ((str(tmp_path / "a.yaml"), ()), (None, [*MINIMAL, f"optimizer.lr={value}"])):
        with pytest.raises(Problems, match=f"optimizer.lr: should be a valid number, .* not '{value}'"):
            config.load(*given)
    (tmp_path / "a.yaml").write_text("model: m\ndata: a\nseed: 010\n")
    assert config.load(str(tmp_path / "a.yaml")).seed == config.load(None, [*MINIMAL, "seed=010"]).seed == 10


def test_off_and_dates_in_files_are_what_they_mean(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "model: m\ndata: a\ndropout: off\noutput: 2026-11-30\ntemplate_kwargs: {d: 2026-11-30}"
    )
    (tmp_path / "a.toml").write_text('model = "m"\ndata = "a"\ndropout = false\noutput = 2026-11-30\n')
    for name in ("a.yaml", "a.toml"):
        made = config.load(str(tmp_path / name))
        assert (made.dropout, made.output) == ("off", "2026-11-30")
    assert config.load(str(tmp_path / "a.yaml")).template_kwargs == {"d": "2026-11-30"}


def test_values_without_end_are_refused(tmp_path: Path) -> None:
    anchors = "".join(
        f"  a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9 if i else ["lol"] * 9) + "]\n" for i in range(12)
    )
    (tmp_path / "laughs.yaml").write_text(f"model: m\ndata: a\ntemplate_kwargs:\n{anchors}")
    (tmp_path / "ring.yaml").write_text("model: m\ndata: a\ntemplate_kwargs: &a {b: *a}\n")
    deep = "[" * 5000 + "]" * 5000
    (tmp_path / "deep.yaml").write_text(f"model: m\ndata: a\ntemplate_kwargs: {{a: {deep}}}\n")
    for name, said in (
        ("laughs", "anchors repeat one another"),
        ("ring", "holds itself"),
        ("deep", "nested too deeply"),
    ):
        with pytest.raises(InputError, match=rf"{name}\.yaml: .*{said}"):
            config.load(str(tmp_path / f"{name}.yaml"))
    with pytest.raises(InputError, match="template_kwargs: it is nested too deeply"):
        config.load(None, [*MINIMAL, f"template_kwargs={deep}"])


@pytest.mark.parametrize("override", ["output=a\udcff", "model=\udcff", "template=\udcff"])
def test_a_name_that_is_no_utf_8_is_refused(override: str) -> None:
    with pytest.raises(Problems, match="UTF-8 text: give the file or folder another name"):
        config.load(None, ["data=a.jsonl", *(MINIMAL[:1] if "model" not in override else ()), override])
