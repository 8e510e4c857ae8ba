"""G6: secrets in the environment, on the command line, in the configuration, in addresses and in ~/.netrc."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import yaml

from deft.core import crash
from deft.export import card
from deft.run import folder as run_folder
from deft.run import train as running
from deft.tracking import console
from faults.harness import Result, Scale, tally
from faults.scenes import arguments, ended, scene

TITLE = "planted secrets kept out of console, run folder, export and crash report"
FIGURE = 10
ENVIRONMENT = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_SERVICE_PASSWORD")


def run(scale: Scale) -> Result:
    return _thrown()


def control() -> Result:
    """Nothing is hidden."""

    def open_() -> None:
        from deft.commands import cli

        for module in (crash, run_folder, console, running, card, cli):
            module.redacted = lambda text: text  # type: ignore[attr-defined]

    return _thrown(open_)


def _thrown(before: Callable[[], object] = lambda: None) -> Result:
    with scene() as folder:
        secrets = _secrets()
        (folder / "home").mkdir()
        (folder / "home" / ".netrc").write_text(f"machine hub login me password {secrets['netrc']}\n")
        (folder / "home" / ".netrc").chmod(0o600)

        def plant() -> None:
            os.environ.update({name: secrets[name] for name in ENVIRONMENT}, HOME=str(folder / "home"))
            before()

        outputs = _outputs(folder, secrets, plant)
        written = {str(path.relative_to(folder)): path.read_bytes() for path in _files(folder)}
        found = {**written, **outputs}
        assert any(b"Traceback" in text for text in found.values()), "there must be a crash report"
        assert {"run/manifest.json", "run/config.yaml", "run/final/README.md"} <= found.keys()
        sees = next(line for line in written["run/config.yaml"].decode().splitlines() if "api_key" in line)
        return tally((_leaks(name, secret, found) for name, secret in secrets.items()), sees.strip())


def _secrets() -> dict[str, str]:
    """By where each is planted; words that occur nowhere else."""
    places = (
        *ENVIRONMENT,
        "netrc",
        "command line",
        "configuration",
        "token in a text",
        "model address",
        "data address",
    )
    shapes = {"token in a text": "hf_{}", "command line": "zeta{}", "configuration": "eta{}"}
    return {place: shapes.get(place, "theta-{}").format(f"Zq{index}" * 8) for index, place in enumerate(places)}


def _outputs(folder: Path, secrets: dict[str, str], plant: Callable[[], object]) -> dict[str, bytes]:
    """What a run, two refused ones and a crash print; they leave their files in the folder."""
    settings = {"template_kwargs": {"api_key": secrets["configuration"], "note": secrets["token in a text"]}}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["train", str(folder / "run.yaml"), *arguments(folder, steps=2)]
    secret = f"template_kwargs.hub_token={secrets['command line']}"
    data, model = (f"https://me:{secrets[place]}@host/x.jsonl" for place in ("data address", "model address"))

    def crashing() -> None:
        plant()

        def fail(*given: object) -> None:
            raise KeyError(f"{secrets['HF_TOKEN']} {secrets['netrc']} {data}")

        running._train = fail  # type: ignore[assignment]

    done = {
        "a run": ended(folder, *words, secret, before=plant),
        "a refused address": ended(folder, *words, f"data.train={data}", f"output={folder / 'a'}", before=plant),
        "a refused model": ended(folder, *words, f"model={model}", f"output={folder / 'b'}", before=plant),
        "a crash": ended(folder, *words, secret, f"output={folder / 'c'}", before=crashing),
    }
    assert [each.code for each in done.values()] == [0, 2, 2, 70], [each.output[-300:] for each in done.values()]
    return {name: each.output.encode() for name, each in done.items()}


def _files(folder: Path) -> list[Path]:
    """Whatever was written, but for what the secrets were planted in."""
    planted = {folder / "run.yaml", folder / "home" / ".netrc"}
    return [path for path in folder.rglob("*") if path.is_file() and path not in planted]


def _leaks(name: str, secret: str, found: dict[str, bytes]) -> str:
    where = [place for place, text in found.items() if secret.encode() in text]
    return f"{name}: in {', '.join(where)}" if where else ""
