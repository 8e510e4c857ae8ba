"""Encoded rows are kept once, used whole or not at all, and the same whoever made them."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import chat, row_encoder, source
from tiny_models import write_llama
from tiny_tokenizers import CHATML, byte_level

from deft.commands import check
from deft.core import files, types, workers
from deft.core.errors import DamagedError, InputError, Problems
from deft.core.files import Disk
from deft.data import shapes, sources
from deft.data.format import Choices
from deft.data.readers import jsonl
from deft.dataset import build, cache, refusals, store, survey
from deft.dataset.build import Dataset
from deft.dataset.cache import Cache
from deft.dataset.source import SourceSpec
from deft.dataset.survey import Execution, glance, understand
from deft.run import config, prepare
from deft.run.reading import Session

ROWS = [chat(f"What is {n}?", "It is " + "very " * (n % 7) + "big.", weight=0.5 + n % 2) for n in range(60)]
ROWS += [ROWS[3], {"messages": [{"role": "user", "content": "Hi"}]}, chat("Hi", "long " * 90), chat("Hi", "", weight=0)]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return written(tmp_path / "train.jsonl", ROWS)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "FIRST_BYTES", 500)
    monkeypatch.setattr(jsonl, "MOST_BYTES", 900)


def written(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encoded(path: Path, root: Path | None, processes: int = 1, encoder: Any = None, **more: Any) -> Dataset:
    said: list[str] = more.pop("said", [])
    execution = Execution(Cache(root, said.append) if root else None, processes)
    understood = understand([SourceSpec(str(path), **more)], execution)
    return build.encode_sources(understood, encoder or row_encoder(), share=0.1, execution=execution)


def content(data: Dataset) -> list[Any]:
    """All that a run takes from its data."""
    sides = [
        [[(part.origin, part.tokens.tolist(), part.weights.tolist()) for part in example] for example in side]
        for side in (data.train, data.held_out)
    ]
    return [*sides, [each.as_json() for each in data.ledgers], data.marks]


def folders(root: Path) -> dict[str, dict[str, bytes]]:
    return {
        folder.name: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


# What is kept is what is made


def test_from_the_cache_comes_what_memory_gives_and_nothing_is_done_again(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = content(encoded(train, tmp_path / "cache"))
    assert first == content(encoded(train, None))
    monkeypatch.setattr(workers, "ordered", None)
    assert content(encoded(train, tmp_path / "cache")) == first


def test_one_process_and_three_write_the_same_bytes(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    monkeypatch.setattr(workers, "HERE", 2)
    monkeypatch.setattr(survey, "COUNTED_HERE", 2)
    monkeypatch.setattr(store, "GROUP_BYTES", 2_000)
    start, used = workers._Pool.__init__, []

    def start_and_wait(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        used.append(len(self._workers))
        self.is_ready.wait()

    monkeypatch.setattr(workers._Pool, "__init__", start_and_wait)
    for processes in (1, 3):
        encoded(train, tmp_path / str(processes), processes)
    assert used == [3, 3], "one that reads, one that encodes"
    assert folders(tmp_path / "1") == folders(tmp_path / "3")
    assert len(folders(tmp_path / "1")) == 2


def test_where_a_file_is_cut_and_how_much_is_looked_at_together_changes_nothing(
    train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(encoded(train, None))
    monkeypatch.setattr(store, "GROUP_BYTES", 7)
    assert content(encoded(train, None)) == whole
    for size in (40, 333, 5000):
        monkeypatch.setattr(jsonl, "FIRST_BYTES", size)
        monkeypatch.setattr(jsonl, "MOST_BYTES", size)
        assert content(encoded(train, None)) == whole


def test_rows_that_others_make_needless_are_found_across_chunks(tmp_path: Path, small_chunks: None) -> None:
    rows = [
        {"type": "binary_feedback", "prompt_id": n % 5, "prompt": f"q{n % 5}", "output": f"a{n}", "label": n >= 20}
        for n in range(40)
    ]
    (ledger,) = encoded(written(tmp_path / "a.jsonl", rows), tmp_path / "cache").ledgers
    assert (ledger.fates["left_out"], ledger.rows) == (20, 40)
    assert ledger.lost[-1][2].startswith("a worse answer than that of ")
    again = encoded(tmp_path / "a.jsonl", tmp_path / "cache", encoder=row_encoder(max_length=99))
    assert again.ledgers[0].fates["left_out"] == 20


def test_lazy_examples_say_the_same_as_the_examples_themselves(train: Path) -> None:
    data = encoded(train, None)
    examples = data.train + data.held_out
    every = list(examples)
    assert len(every) == len(examples) > 50
    assert examples.sizes().tolist() == [sum(len(part.tokens) for part in example) for example in every]
    for number, example in enumerate(every):
        assert examples.lengths(number) == [len(part.tokens) for part in example]
        assert examples.targets(number) == sum(int((part.weights[1:] > 0).sum()) for part in example)
        assert [part.tokens.tolist() for part in examples[number]] == [part.tokens.tolist() for part in example]
    assert [part.origin for part in examples[-1]] == [part.origin for part in every[-1]]
    assert [example[0].origin for example in examples[2:9:3]] == [example[0].origin for example in every[2:9:3]]
    limit = int(np.median([int(part.tokens.max()) for example in every for part in example]))
    past = {part.origin: int(part.tokens.max()) for example in every for part in example if part.tokens.max() >= limit}
    assert examples.out_of_vocabulary(limit) == past
    with pytest.raises(IndexError):
        examples[len(examples)]


def test_weights_and_warnings_survive_the_disk_to_the_bit(tmp_path: Path) -> None:
    rows = [
        {**chat("Hi", "Hello", weight=1e-7), "loss_weight": 1 / 3},
        {"messages": [*chat("a", "b", weight=0.1)["messages"], *chat("c <|im_end|>", "d", weight=0.7)["messages"]]},
    ]
    path = written(tmp_path / "a.jsonl", rows)
    data = encoded(path, tmp_path / "cache", loss_weight=0.3)
    parts = {part.origin.line: part for side in (data.train, data.held_out) for example in side for part in example}
    assert set(parts[1].weights.tolist()) == {0.0, float(np.float32(1e-7) * np.float32(1 / 3 * 0.3))}
    expected = {0.0, *(float(np.float32(weight) * np.float32(0.3)) for weight in (0.1, 0.7))}
    assert set(parts[2].weights.tolist()) == expected
    assert data.ledgers[0].count("special_tokens_as_text") == 1


def test_rows_in_memory_and_from_a_pipe_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execution = Execution(Cache(tmp_path / "cache"))
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(lines))))
    piped = build.encode_sources(understand([SourceSpec("-")], execution), row_encoder(), execution=execution)
    held = build.encode_sources(
        understand([SourceSpec("rows", rows=tuple(ROWS))], execution), row_encoder(), execution=execution
    )
    assert piped.ledgers[0].fates == held.ledgers[0].fates
    assert piped.train[0][0].origin.source == "stdin"
    assert not (tmp_path / "cache").exists()


# What it depends on


def keys(path: Path, root: Path, **more: Any) -> set[str]:
    before = set(folders(root)) if root.exists() else set()
    encoded(path, root, **more)
    return set(folders(root)) - before


@pytest.mark.parametrize(
    "changed",
    [
        {"template": CHATML.replace("<|im_end|>", "</s>")},
        {"max_length": 255},
        {"train_on": "last_assistant"},
        {"overflow": "drop"},
        {"truncation_side": "left"},
        {"render": "raw"},
        {"template_kwargs": {"a": 1}},
        {"stop_ids": (4,)},
        {"tokenizer": byte_level(puts_bos=True)},
        {"tokenizer": byte_level(bos=False)},
    ],
    ids=str,
)
def test_another_way_to_tokens_has_another_digest(train: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    assert len(keys(train, tmp_path / "cache")) == 2, "one of what was read, one of what was encoded"
    assert keys(train, tmp_path / "cache") == set()
    assert len(keys(train, tmp_path / "cache", encoder=row_encoder(**changed))) == 1


@pytest.mark.parametrize(
    "changed", [{"max_rows": 60}, {"format": "messages"}, {"choices": Choices(split="test")}], ids=str
)
def test_another_reading_has_another_digest(train: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    keys(train, tmp_path / "cache")
    assert len(keys(train, tmp_path / "cache", **changed)) == 2


def test_other_content_has_another_digest_and_another_time_has_not(train: Path, tmp_path: Path) -> None:
    keys(train, tmp_path / "cache")
    os.utime(train, (0, 0))
    assert keys(train, tmp_path / "cache") == set()
    train.write_bytes(train.read_bytes().replace(b"very", b"vary", 1))
    assert len(keys(train, tmp_path / "cache")) == 2


def test_each_file_that_can_change_a_token_changes_the_key_and_no_other_does(tmp_path: Path) -> None:
    """Tried on a copy of the package, beside the modules that a process has imported that encoded rows."""
    package = shutil.copytree(
        Path(cache.__file__).parents[1], tmp_path / "deft", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    script = [sys.executable, "-c", CHANGE_EACH_FILE]
    said = subprocess.run(script, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)
    executed, changing = set(found["executed"]), set(found["changing"])
    assert {f"encoding/{name}.py" for name in ("ascii_words", "tokenizer", "rows", "render/template")} <= executed
    assert {"data/formats/messages.py", "data/readers/tables.py"} <= executed
    assert executed <= changing, sorted(executed - changing)
    assert changing <= executed | {"data/held.py"}, sorted(changing - executed)
    others = {file.relative_to(package).as_posix() for file in package.rglob("*.py")} - changing
    assert {"core/workers.py", "tracking/console.py", "dataset/splits.py", "dataset/cache.py", "run/train.py"} <= others


CHANGE_EACH_FILE = """
import json, sys
from pathlib import Path
from deft.data import shapes
from deft.data.format import Choices
from deft.dataset import examples
from deft.dataset.source import SourceSpec, items
from deft.encoding.rows import Policy
from deft.encoding.render.template import Chosen
from deft.encoding.tokenizer import wrap
from tiny_tokenizers import CHATML, byte_level

encoder = examples.encoder(wrap(byte_level()), Chosen(CHATML, "", True), Policy(256))
chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <|im_end|>"}]
rows = SourceSpec("rows", rows=({"messages": chat}, {"messages": [*chat, *chat]}))
(item,) = items(rows, ())
counted = shapes.counter(("rows", "auto", Choices()))(item[0])
assert shapes.survey([counted], "rows", "auto", Choices()).shape == "messages"
chunk = examples.maker(examples.Recipe.of(encoder, rows, "messages"))(item)
assert chunk.batch.column("examples").value_lengths().to_pylist() == [1, 1], chunk.batch.column("reason")
places = (Path(module.__file__) for name, module in sys.modules.items() if name.startswith("deft."))
executed = [place for place in places if place.name != "__init__.py"]
from deft.dataset import cache

package, key, changing = Path(cache.__file__).parents[1], cache.code(), []
for file in sorted(package.rglob("*.py")):
    text = file.read_bytes()
    file.write_bytes(text + b"# changed")
    cache.code.cache_clear()
    changing += [file] if cache.code() != key else []
    file.write_bytes(text)
names = {"executed": executed, "changing": changing}
print(json.dumps({name: [file.relative_to(package).as_posix() for file in files] for name, files in names.items()}))
"""


def test_another_version_of_a_library_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache.code.__wrapped__()
    for library in ("tokenizers", "transformers", "jinja2", "numpy", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setattr(cache, "version", lambda name, library=library: "0" if name == library else version(name))
            assert cache.code.__wrapped__() != key, library


def test_a_library_that_is_imported_for_types_alone_leaves_the_key_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "if TYPE_CHECKING:\n    import torch\n" in Path(types.__file__).read_text(), "else this tests nothing"
    key = cache.code.__wrapped__()
    monkeypatch.setattr(cache, "version", lambda name: "0" if name == "torch" else version(name))
    assert cache.code.__wrapped__() == key


def test_files_of_a_folder_and_a_user_s_own_format_are_in_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir()
    for name in "ab":
        written(tmp_path / "rows" / f"{name}.jsonl", ROWS[:2])
    ((_, found),) = understand([SourceSpec(str(tmp_path / "rows"))], Execution(Cache(tmp_path / "cache")))
    assert [Path(name).name for name in found.content] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "own_format.py").write_text("def fn(row): return row\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"format": "own_format:fn"}
    assert len(keys(tmp_path / "rows", tmp_path / "cache", **own)) == 2
    assert keys(tmp_path / "rows", tmp_path / "cache", **own) == set()
    (tmp_path / "own_format.py").write_text("def fn(row): return {**row}\n")
    assert len(keys(tmp_path / "rows", tmp_path / "cache", **own)) == 2


def test_a_file_that_changes_while_it_is_encoded_is_not_kept(train: Path, tmp_path: Path) -> None:
    execution = Execution(Cache(tmp_path / "cache"))
    understood = understand([SourceSpec(str(train))], execution)
    written(train, ROWS[:9])
    with pytest.raises(InputError, match=r"train\.jsonl: changed while it was read"):
        build.encode_sources(understood, row_encoder(), execution=execution)
    assert len(folders(tmp_path / "cache")) == 1


# Damage, kills, company


@pytest.mark.parametrize("harm", ["flip", "cut", "delete", "grow"])
def test_what_is_damaged_is_noticed_said_and_made_again(train: Path, tmp_path: Path, harm: str) -> None:
    root, draw = tmp_path / "cache", random.Random(harm)
    whole = content(encoded(train, root))
    paths = [path for folder in root.iterdir() if folder.is_dir() for path in sorted(folder.iterdir())]
    assert {path.name for path in paths} == {store.ROWS, files.MANIFEST, "survey.json"}
    for path in paths:
        data = bytearray(path.read_bytes())
        if harm == "delete":
            path.unlink()
        elif harm == "grow":
            path.write_bytes(data + b"\0")
        elif data:
            place = draw.randrange(len(data))
            data[place] ^= 1 << draw.randrange(8)
            path.write_bytes(data if harm == "flip" else data[:place])
        else:
            continue
        said: list[str] = []
        assert content(encoded(train, root, said=said)) == whole, path.name
        if path.name != files.MANIFEST or harm != "grow":
            assert ["the cache is damaged and is made again" in line for line in said] == [True], (path.name, said)


class Dying(Disk):
    """A disk whose process is killed before its operation `last`."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __getattribute__(self, name: str) -> Any:
        if name in ("open", "write", "sync", "sync_folder", "mkdir", "rename", "unlink", "rmdir"):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return object.__getattribute__(self, name)


def in_a_child(work: Any) -> int:
    """The wait status of a child that did `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def test_a_killed_build_is_never_used_and_its_debris_goes(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    monkeypatch.setattr(store, "GROUP_BYTES", 2_000)
    whole = content(encoded(train, tmp_path / "whole"))
    reference = folders(tmp_path / "whole")
    counting = Dying(10**9)
    monkeypatch.setattr(files, "disk", counting)
    encoded(train, tmp_path / "counted")
    operations = 10**9 - counting.left
    assert operations > 80
    debris = 0
    for point in random.Random(0).sample(range(operations), 20):
        root = tmp_path / f"killed-{point}"

        def build(root: Path = root, point: int = point) -> None:
            files.disk = Dying(point)
            encoded(train, root)

        assert in_a_child(build) == signal.SIGKILL
        debris += any(path.name.startswith(".") for path in root.iterdir()) if root.exists() else 0
        monkeypatch.setattr(files, "disk", Disk())
        assert content(encoded(train, root)) == whole
        assert folders(root) == reference, "no folder is left beside those that are whole"
    assert debris > 10


def test_two_that_build_at_once_build_it_once(train: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"

    def build() -> None:
        staged = files.staged
        files.staged = lambda folder: log.open("a").write("made\n") and staged(folder)  # type: ignore
        encoded(train, root)
        os._exit(0)

    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                build()
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert log.read_text() == "made\n" * 2, "what was read, and what was encoded"
    assert content(encoded(train, root)) == content(encoded(train, None))


def test_who_waits_for_another_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    held = Cache(tmp_path)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with held._turn("key"):
            os.write(writer, b"x")
            os.read(os.pipe()[0], 0)
            signal.pause()
    os.read(reader, 1)

    class Saying(list):  # type: ignore[type-arg]
        def append(self, text: str) -> None:
            said.append(text)
            os.kill(pid, signal.SIGKILL)

    with Cache(tmp_path, Saying().append)._turn("key"):
        assert said == ["another process encodes these rows; waiting for it"]
    os.waitpid(pid, 0)


def test_a_cache_that_cannot_be_written_names_its_folder(train: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(files.DiskError, match="DEFT_CACHE names another folder"):
        encoded(train, tmp_path / "file" / "cache")


class Full(Disk):
    """A disk that has no space left for a file of rows beyond its beginning."""

    def write(self, file: Any, data: memoryview) -> None:
        if str(file.name).endswith(store.ROWS) and file.tell() > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(file, data)


def test_a_full_disk_is_named_and_nothing_is_left_behind(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "disk", Full())
    with pytest.raises(files.DiskError, match=r"(?s)No space left.*DEFT_CACHE names another folder"):
        encoded(train, tmp_path / "cache")
    monkeypatch.setattr(files, "disk", Disk())
    assert [list(each) for each in folders(tmp_path / "cache").values()] == [[files.MANIFEST, "survey.json"]]


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFT_CACHE", "/a")
    assert cache.root() == Path("/a")
    monkeypatch.delenv("DEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.root() == Path("/b/deft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache.root() == Path("/c/.cache/deft")


# A large source


def test_rows_that_cannot_be_read_stop_a_large_run_before_any_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama(tmp_path / "model", chat_template=CHATML)
    bad = {"messages": [{"role": "usr", "content": "Hi"}]}
    path = written(tmp_path / "rows.jsonl", [*ROWS, *[bad] * 30])
    monkeypatch.setattr(refusals, "SOON_ENCODED", 50)
    made = config.make({"model": str(model), "data": {"train": str(path)}})
    encode = build.encode_sources
    monkeypatch.setattr(build, "encode_sources", None)
    with pytest.raises(Problems, match="32 of 94 rows cannot be read, and none was encoded") as raised:
        prepare.prepare(made, Session(console=check.Console(quiet=True)))
    assert "rows.jsonl:62: messages: no assistant message" in str(raised.value)
    assert "(and 29 more: " in str(raised.value)
    monkeypatch.setattr(build, "encode_sources", encode)
    allowed = made.model_copy(update={"data": made.data.model_copy(update={"allow_refused": 32})})
    assert prepare.prepare(allowed, Session(console=check.Console(quiet=True))).data.ledgers[0].fates["refused"] == 32


def test_more_bad_rows_than_are_kept_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "NAMED", 5)
    ((_, found),) = understand([SourceSpec("a", rows=(ROWS[0], *[{"messages": []}] * 9))])
    assert (len(found.refused), found.refused_rows, found.rows) == (5, 9, 10)
    mixed = ({"question": "a", "answer": "b", "messages": ROWS[0]["messages"]},) * 9
    with pytest.raises(Problems) as raised:
        understand([SourceSpec("a", rows=mixed)])
    assert len(raised.value.problems) + raised.value.more == 10


def test_the_beginning_is_enough_to_show_a_large_file(
    train: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    with train.open("a") as file:
        file.write("broken\n" * 3)
    ((spec, found),) = glance([SourceSpec(str(train))])
    assert not found.is_whole
    assert found.rows < 60
    assert understand([spec])[0][1].rows == len(ROWS) + 3
    assert next(sources.chunks(str(train))).last < (10, 0)
    assert source(*ROWS[:2])[1].is_whole


def test_a_users_format_is_read_anew_when_a_module_that_it_imports_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"my_rows": "from my_words import OPENING\n", "my_words": "OPENING = 'Hi'\n", "my_other": "BESIDE = 1\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = cache.own_code("my_rows")
    (tmp_path / "my_other.py").write_text("BESIDE = 2\n")
    assert cache.own_code("my_rows") == before
    (tmp_path / "my_words.py").write_text("OPENING = 'Hello'\n")
    assert cache.own_code("my_rows") != before


# What is used is what was read


def test_a_file_that_changes_while_it_is_read_is_refused_and_nothing_of_it_kept(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its own content again before anybody could hash it."""
    plain, root = shapes.survey, tmp_path / "cache"
    own = train.read_bytes()

    def survey_of_another(*given: Any) -> Any:
        train.write_bytes(own.replace(b"big", b"bad"))
        found = plain(*given)
        train.write_bytes(own)
        return found

    execution = Execution(Cache(root), processes=1)
    with monkeypatch.context() as changed:
        changed.setattr(shapes, "survey", survey_of_another)
        with pytest.raises(Problems, match=r"changed while it was read; start again"):
            understand([SourceSpec(str(train))], execution)
    assert not [path for path in root.iterdir() if path.is_dir()]
    understand([SourceSpec(str(train))], execution)


def test_a_byte_of_the_cache_that_changes_after_it_was_verified_is_not_trained_on(train: Path, tmp_path: Path) -> None:
    data = encoded(train, tmp_path / "cache")
    before = [part.tokens.tobytes() for example in data.train for part in example]
    assert [part.tokens.tobytes() for example in encoded(train, tmp_path / "cache").train for part in example] == before
    (path,) = (tmp_path / "cache").glob(f"*/{store.ROWS}")
    content, tokens = bytearray(path.read_bytes()), np.frombuffer(before[5], np.int32)
    at = content.index(tokens.tobytes())
    content[at] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    with pytest.raises(DamagedError, match="its tokens are not those that were written to the cache"):
        list(data.train)


@pytest.mark.parametrize("filling", [b"\x00", b"\xff", b"\x7f", b"\x05"])
def test_any_damage_to_a_cache_that_is_read_is_told(train: Path, tmp_path: Path, filling: bytes) -> None:
    data = encoded(train, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob(f"*/{store.ROWS}")
    size = path.stat().st_size
    for start in range(512, size - 512, 256):
        own = path.read_bytes()
        with path.open("r+b") as file:
            file.seek(start)
            file.write(filling * 256)
        for number in range(len(data.train)):
            for read in (data.train.lengths, data.train.targets, data.train.__getitem__):
                with suppress(DamagedError):
                    read(number)
        with path.open("r+b") as file:
            file.write(own)
    assert len(list(data.train)) == len(data.train)
