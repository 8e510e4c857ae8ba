"""Every name that a user gives is read: one that does not exist is refused, with the closest that does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from pydantic import BaseModel
from tiny_models import write_llama

import deft
from deft.core import registry
from deft.core.errors import InputError, UserCodeError
from deft.dataset.config import SourceConfig
from deft.run import config, reading
from deft.run.config import Config
from deft.run.reading import Session
from deft.training import loss, optim

NO = "no_such_name"
FREE = {"output", "data.add_tokens"}
"""Keys whose value may be any text."""


def named(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The keys whose value is a name: text, or one of several words."""
    found = []
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        if any(kind is str or getattr(kind, "__origin__", None) in (str, Literal) for kind in kinds):
            found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += named(field.annotation, f"{prefix}{name}.")
    return found


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """What a run needs."""
    write_llama(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    return {"model": str(tmp_path / "model"), "data": str(tmp_path / "a.jsonl"), "output": str(tmp_path / "run")}


def refusal(given: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        reading.check(config.make(config.nested({**given, **settings})), Session())
    return str(error.value)


def test_the_keys_that_are_names_are_found() -> None:
    assert {"optimizer.name", "loss.name", "schedule.name", "device", "template", "evaluate.prompts"} <= {
        *named(Config)
    }


@pytest.mark.parametrize("key", sorted({*named(Config)} - FREE))
def test_a_name_that_does_not_exist_is_refused(key: str, given: dict[str, Any]) -> None:
    message = refusal({**given, key.replace(".", "__"): NO})
    assert NO in message


@pytest.mark.parametrize("key", ["path", "format", "answers", "subset"])
def test_so_is_one_of_a_source(key: str, given: dict[str, Any]) -> None:
    assert key in SourceConfig.model_fields
    assert NO in refusal({**given, "data": {"train": [{"path": given["data"], key: NO}]}})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer__name", "adam", "optimizer.name: 'adam' is not there; did you mean 'adamw'?"),
        ("optimizer__name", "zzz", "optimizer.name: 'zzz' is not there; there is adafactor, adamw, lion, muon, sgd"),
        ("loss__name", "nil", "loss.name: 'nil' is not there; did you mean 'nll'?"),
        ("loss__name", "reference", "loss.name: 'reference' is not there; there is "),
        ("schedule__name", "cosin", "did you mean 'cosine'?"),
    ],
)
def test_the_closest_is_named(key: str, value: str, said: str, given: dict[str, Any]) -> None:
    assert said in refusal(given, **{key: value})


def test_all_of_them_come_at_once(given: dict[str, Any]) -> None:
    message = refusal(given, optimizer__name="adam", loss__name="nil", device="cud")
    for key in ("optimizer.name", "loss.name", "device"):
        assert f"  {key}: " in message


def test_a_run_with_an_optimizer_that_is_not_there_leaves_no_folder(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no_such_optimizer"):
        deft.train(**given, optimizer__name="no_such_optimizer")
    assert not Path(given["output"]).exists()


def test_a_room_is_a_package_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a_house" / "a_room"
    folder.mkdir(parents=True)
    for name in ("first", "second", "_hidden"):
        (folder / f"{name}.py").write_text(f"NAME = {name!r}\n")
    for package in (folder, folder.parent):
        (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    import a_house.a_room  # type: ignore[import-not-found]

    assert registry.names(a_house.a_room) == ["first", "second"]
    assert registry.load(a_house.a_room, "first", "key").NAME == "first"
    for name in ("_hidden", "third"):
        with pytest.raises(InputError, match=f"key: '{name}' is not there"):
            registry.load(a_house.a_room, name, "key")


@pytest.mark.parametrize("room", [loss, optim], ids=lambda room: room.__name__)
def test_each_module_of_a_room_has_what_is_called(room: Any) -> None:
    called = {loss: ("make",), optim: ("make",)}[room]
    for name in registry.names(room):
        module = registry.load(room, name, "key")
        assert all(callable(getattr(module, each)) for each in called)


OWN = {
    "plain": "def turn(row):\n    return row\n",
    "broken": "import math\nROOT = math.sqrt(-1)\n",
    "needy": "import no_such_dependency\n",
}


@pytest.mark.parametrize("key", ["loss__name", "data__format"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:turn", "cannot be imported (No module named 'no_such_module'); is it on PYTHONPATH?"),
        ("my_plain:trun", "my_plain has no function 'trun'; did you mean 'turn'?"),
        ("my_plain:__name__", "my_plain has no function '__name__'; it has turn; name one as my_plain:fn"),
        ("my_broken:turn", "importing my_broken raised ValueError: math domain error"),
        ("my_needy:turn", "importing my_needy raised ModuleNotFoundError: No module named 'no_such_dependency'"),
    ],
)
def test_an_import_path_that_leads_nowhere_is_refused(
    key: str, name: str, said: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, code in OWN.items():
        (tmp_path / f"my_{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {key: name} if key == "loss__name" else {"data": {"train": [{"path": given["data"], "format": name}]}}
    message = refusal({**given, **settings})
    assert f"{key.replace('__', '.')}: {said}" in message.replace(f"{name!r} cannot", "cannot")
    if "broken" in name:
        assert f'File "{tmp_path / "my_broken.py"}", line 2' in message


def broken() -> Any:
    yield {"prompt": "a", "completion": "b"}
    raise ValueError("the file is gone")


def test_iterables_of_the_user_s_are_guarded(given: dict[str, Any]) -> None:
    model, output = given["model"], given["output"]
    with pytest.raises(UserCodeError, match="samples raised ValueError: the file is gone"):
        deft.train(model, samples=broken(), output=output)
    with pytest.raises(UserCodeError, match="eval_prompts raised ValueError: the file is gone"):
        deft.train(**given, eval_prompts=broken())
    with pytest.raises(UserCodeError, match="rows raised ValueError: the file is gone"):
        deft.encode(broken(), model)
    with pytest.raises(InputError, match=r"samples: text, not a list of rows; .* a file: name it with data="):
        deft.train(model, samples="a.jsonl", output=output)
    assert not Path(output).exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [("None", "gave NoneType"), ("weights", r"gave a tensor of shape \[3\]"), ("logits.detach().sum()", "a gradient")],
)
def test_what_a_users_loss_gives_is_checked(
    value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from deft.core.types import Head
    from deft.training import objectives as losses

    (tmp_path / "my_loss.py").write_text(f"def value(logits, targets, weights):\n    return {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_loss", raising=False)
    own, head = losses.load("my_loss:value"), Head(torch.ones(5, 2, requires_grad=True))
    with pytest.raises(InputError, match=rf"loss\.name: my_loss:value .*{said}"):
        own(torch.ones(3, 2), head, torch.tensor([0, 1, 2]), torch.ones(3))
