"""G5: names that lead out of the folder they stand in, NUL bytes, links."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deft.core import files
from deft.model import security
from faults.harness import Result, Scale, tally
from faults.scenes import Ended, arguments, edit_json, ended, scene

TITLE = "path tricks: nothing outside is read as ours, or written"
FIGURE = 20
SECRET = "what-stands-outside"


def run(scale: Scale) -> Result:
    return _thrown(dict(list(POINTS.items())[:: scale.of(4, 1, 1)]))


def control() -> Result:
    """Names are taken as they are."""

    def trusting() -> None:
        security.check_index = lambda path: None  # type: ignore[assignment]
        files._inside = lambda name: name

    names = ("index: ../", "index: absolute", "manifest: ../", "manifest: absolute")
    return _thrown({name: POINTS[name] for name in names}, trusting)


def _thrown(points: dict[str, Any], before: Callable[[], object] = lambda: None) -> Result:
    found = {name: _point(name, plant, before) for name, plant in points.items()}
    sees = next((text for _, text in found.values() if "not a file beside it" in text), "")
    return tally((failure for failure, _ in found.values()), sees)


def _point(name: str, plant: Callable[[Path], Sequence[str]], before: Callable[[], object]) -> tuple[str, str]:
    with scene() as top:
        folder, outside = top / "inside", top / "outside"
        folder.mkdir()
        outside.mkdir()
        for each in ("model", "train.jsonl"):
            (top / each).rename(folder / each)
        (outside / "kept").write_text(SECRET)
        shutil.copy(folder / "model" / "model.safetensors", outside / "weights.safetensors")
        words = plant(folder)
        held = _tree(outside)
        done = ended(top, *words, before=before)
        return _judged(name, done, held == _tree(outside)), done.output.replace(f"{top}/", "")[-300:]


def _judged(name: str, done: Ended, is_kept: bool) -> str:
    if not is_kept:
        return f"{name}: something outside was changed"
    if SECRET in done.output:
        return f"{name}: something outside was read"
    is_refused = done.code in (2, 3, 4) and not done.has_traceback
    return "" if is_refused else f"{name}: exit code {done.code}: {done.output[-300:]}"


def _tree(folder: Path) -> set[tuple[str, bytes]]:
    return {(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def _index(name: Any) -> Callable[[Path], Sequence[str]]:
    """A file name in the index of a model's weights."""

    def plant(folder: Path) -> Sequence[str]:
        model = folder / "model"
        weights = json.loads((model / "model.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
        (model / "model.safetensors").rename(model / "other.safetensors")
        named = name.format(outside=folder.parent / "outside") if isinstance(name, str) else name
        index = {"metadata": {}, "weight_map": {key: named for key in weights if key != "__metadata__"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        return ["train", *arguments(folder, steps=1)]

    return plant


def _tokenizer(key: str) -> Callable[[Path], Sequence[str]]:
    """A file of the tokenizer named elsewhere."""

    def plant(folder: Path) -> Sequence[str]:
        model, outside = folder / "model", folder.parent / "outside"
        (model / "tokenizer.json").rename(outside / "tokenizer.json")
        edit_json(model / "tokenizer_config.json", **{key: str(outside / "tokenizer.json")})
        return ["train", *arguments(folder, steps=1)]

    return plant


def _setting(**settings: str) -> Callable[[Path], Sequence[str]]:
    return lambda folder: ["train", *arguments(folder, **{k: v.format(folder=folder) for k, v in settings.items()})]


def _manifest(change: Callable[[dict[str, Any], Path], None]) -> Callable[[Path], Sequence[str]]:
    """The manifest of a checkpoint that a killed run left."""

    def plant(folder: Path) -> Sequence[str]:
        words = _killed(folder)
        for step in (folder / "run" / "checkpoints").iterdir():
            listed = json.loads((step / "manifest.json").read_text())
            change(listed["files"], step)
            (step / "manifest.json").write_text(json.dumps(listed))
        return words

    return plant


def _named(name: str) -> Callable[[Path], Sequence[str]]:
    """One more file in the manifest, which is there with the right digest, but outside."""

    def change(listed: dict[str, Any], step: Path) -> None:
        outside = step.parents[3] / "outside"
        first = next(iter(listed))
        shutil.copy(step / first, outside / "part.json")
        listed[name.format(outside=outside)] = listed.pop(first)

    return _manifest(change)


def _killed(folder: Path) -> list[str]:
    words = ["train", *arguments(folder, checkpoint__every=2)]
    done = ended(folder.parent, *words)
    assert done.code == 0, done.output
    shutil.rmtree(folder / "run" / "final")
    return words


def _linked_file(folder: Path) -> Sequence[str]:
    """A checkpoint's file as a link to one outside with the same bytes."""
    words, outside = _killed(folder), folder.parent / "outside"
    for step in (folder / "run" / "checkpoints").iterdir():
        path = next(step.glob("model-*.safetensors"))
        path.rename(outside / f"{step.name}.safetensors")
        path.symlink_to(outside / f"{step.name}.safetensors")
    return words


def _linked_output(folder: Path) -> Sequence[str]:
    (folder / "run").symlink_to(folder.parent / "outside")
    return ["train", *arguments(folder)]


def _dangling_output(folder: Path) -> Sequence[str]:
    (folder / "run").symlink_to(folder.parent / "outside" / "new")
    return ["train", *arguments(folder)]


def _output_below_a_file(folder: Path) -> Sequence[str]:
    return ["train", *arguments(folder, output=folder.parent / "outside" / "kept" / "run")]


POINTS: dict[str, Callable[[Path], Sequence[str]]] = {
    "index: ../": _index("../../outside/weights.safetensors"),
    "index: absolute": _index("{outside}/weights.safetensors"),
    "index: folder/../../": _index("x/../../../outside/weights.safetensors"),
    "index: backslashes": _index("..\\..\\outside\\weights.safetensors"),
    "index: NUL": _index("model.safetensors\0"),
    "index: not a name": _index(7),
    "index: empty": _index(""),
    "index: ..": _index(".."),
    "tokenizer_config: tokenizer_file": _tokenizer("tokenizer_file"),
    "tokenizer_config: vocab_file": _tokenizer("vocab_file"),
    "data: NUL": _setting(data__train="{folder}/train\0.jsonl"),
    "model: NUL": _setting(model="{folder}/mo\0del"),
    "output: NUL": _setting(output="{folder}/r\0un"),
    "template: NUL": _setting(template="{folder}/a\0.jinja"),
    "output: a link to a folder in use": _linked_output,
    "output: a dangling link": _dangling_output,
    "output: below a file": _output_below_a_file,
    "manifest: ../": _named("../../../../outside/part.json"),
    "manifest: absolute": _named("{outside}/part.json"),
    "manifest: folder/../": _named("x/../cursor.json"),
    "manifest: NUL": _named("cursor\0.json"),
    "checkpoint: a link in place of a file": _linked_file,
    "resume: ../": _setting(resume="../../outside"),
    "replay: a bad step elsewhere": lambda folder: ["replay", str(folder.parent / "outside")],
}
