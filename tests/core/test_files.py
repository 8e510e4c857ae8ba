"""The one room that writes: whole or not at all, checked before use, nothing removed that is not provably deft's."""

from __future__ import annotations

import ast
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from deft.core import files
from deft.core.errors import DamagedError, DiskError, InputError

SOURCE = Path(files.__file__).parent


def write(folder: Path, **names: bytes) -> Path:
    with files.staged(folder, {"step": 3}) as staging:
        for name, data in names.items():
            staging.write(name, [data])
    return folder


class Full(files.Disk):
    """A disk with so many bytes left."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, file: IO[bytes], data: memoryview) -> None:
        fits = min(len(data), self.room)
        self.room -= fits
        super().write(file, data[:fits])
        if fits < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_has_what_was_written_and_its_manifest_says_so(tmp_path: Path) -> None:
    with files.staged(tmp_path / "a" / "b", {"step": 3}) as staging:
        staging.write("numbers.bin", [np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros(0)])
        staging.write_json("inner/state.json", {"é": 1})
        (staging.path / "other.txt").write_text("by others")
        staging.about["rows"] = 7
    manifest = files.verify(tmp_path / "a" / "b")
    assert manifest.about == {"step": 3, "rows": 7}
    assert sorted(manifest.files) == ["inner/state.json", "numbers.bin", "other.txt"]
    assert manifest.files["numbers.bin"].bytes == 24
    assert np.fromfile(tmp_path / "a" / "b" / "numbers.bin", np.int32).tolist() == list(range(6))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(b"abXd"), r"one: checksum differs \(block 1\)"),
        (lambda path: path.write_bytes(b"abc"), "one: 3 bytes long, 4 were written"),
        (lambda path: path.unlink(), "one: cannot be read"),
        (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), "one: is not a plain file"),
        (lambda path: (path.parent / files.MANIFEST).unlink(), "manifest.json: cannot be read"),
        (lambda path: (path.parent / files.MANIFEST).write_text("{"), "manifest.json: checksum differs"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", one=b"abcd", two=b"")
    damage(folder / "one")
    with pytest.raises(DamagedError, match=said):
        files.verify(folder)


def test_a_manifest_that_was_edited_is_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "a", one=b"abcd") / files.MANIFEST
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    assert json.loads(path.read_text())["about"] == {"step": 4}
    with pytest.raises(DamagedError, match=r"manifest.json: checksum differs"):
        files.verify(tmp_path / "a")


def test_the_damaged_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 4)
    folder = write(tmp_path / "x", one=b"abcdefghij")
    (folder / "one").write_bytes(b"abcdefgXij")
    with pytest.raises(DamagedError, match=r"one: checksum differs \(block 2\)"):
        files.verify(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\0b", ".", "", "a//b", "./a"])
def test_no_name_leads_outside(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", one=b"abcd")
    manifest = json.loads((folder / files.MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["one"]
    (folder / files.MANIFEST).write_bytes(files._sealed({key: manifest[key] for key in ("files", "about")}))
    with pytest.raises(DamagedError, match=r"manifest\.json: checksum differs"):
        files.verify(folder)
    with pytest.raises(InputError), files.staged(tmp_path / "y") as staging:
        staging.write(name, [b"x"])


class Noted(files.Disk):
    """Notes each operation with the last name of what it is done to, staging names as `*`."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def _note(self, what: str, path: Any) -> None:
        name = Path(path).name
        self.done.append(f"{what} {'*' if files._STAGED.fullmatch(name) else name}")

    def write(self, file: IO[bytes], data: memoryview) -> None:
        self._note("write", file.name)
        super().write(file, data)

    def sync(self, file: IO[bytes]) -> None:
        self._note("sync", file.name)
        super().sync(file)

    def sync_folder(self, path: Path) -> None:
        self._note("sync", path)
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._note("rename to", target)
        super().rename(source, target)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    disk = Noted()
    monkeypatch.setattr(files, "disk", disk)
    return disk.done


def test_a_file_gets_its_name_when_its_bytes_are_safe(tmp_path: Path, noted: list[str]) -> None:
    files.write_text(tmp_path / "a.json", "{}")
    assert noted == ["write *", "sync *", "rename to a.json", f"sync {tmp_path.name}"]


def test_a_folder_gets_its_name_when_all_in_it_is_safe_its_manifest_last(tmp_path: Path, noted: list[str]) -> None:
    with files.staged(tmp_path / "b") as staging:
        staging.write("one", [b"1"])
        (staging.path / "other").write_text("by others")
    assert noted == [
        *("write one", "sync one", "sync other", "write manifest.json", "sync manifest.json"),
        *("sync *", "rename to b", f"sync {tmp_path.name}"),
    ]


@pytest.mark.parametrize("room", [0, 3, 4, 20, 200])
def test_a_full_disk_leaves_nothing_of_the_new_and_all_of_the_old(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_text(tmp_path / "log", "one\n")
    write(tmp_path / "old", one=b"abcd")
    monkeypatch.setattr(files, "disk", Full(room))
    with pytest.raises(DiskError, match=r"new: cannot be written \(No space left"):
        write(tmp_path / "new", one=b"abcd", two=b"ef")
    monkeypatch.setattr(files, "disk", Full(room))
    with pytest.raises(DiskError, match="log: cannot be written"):
        files.append(tmp_path / "log", b"x" * 201)
    with pytest.raises(DiskError, match="log: cannot be written"):
        files.write_bytes(tmp_path / "log", b"x" * 201)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "old"]
    assert (tmp_path / "log").read_text() == "one\n"
    files.verify(tmp_path / "old")


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", one=b"abcd")
    with pytest.raises(InputError, match="exists already"):
        write(folder, one=b"ef")
    with pytest.raises(InputError, match="exists already"), files.staged(tmp_path / "y"):
        (tmp_path / "y").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]
    files.verify(folder)


def test_only_what_deft_wrote_is_removed(tmp_path: Path) -> None:
    files.remove(write(tmp_path / "a", one=b"1"))
    folder = write(tmp_path / "b", one=b"1")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt: was not written by deft"):
        files.remove(folder)
    (tmp_path / "c").mkdir()
    with pytest.raises(DamagedError):
        files.remove(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    files.verify(folder)


def test_what_a_dead_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        with files.staged(tmp_path / "dead") as staging:
            staging.write("one", [b"1"])
            os._exit(0)
    os.waitpid(process, 0)
    for name in (".mine", ".dead.old", "dead.deft-0123abcd", ".dead.deft-0123"):
        (tmp_path / name).mkdir()
    with files.staged(tmp_path / "living") as staging:
        (left,) = files.sweep(tmp_path)
        assert left.name.startswith(".dead.deft-")
        staging.write("one", [b"1"])
    assert files.sweep(tmp_path / "no such folder") == []
    assert {path.name for path in tmp_path.iterdir()} == {
        ".mine", ".dead.old", "dead.deft-0123abcd", ".dead.deft-0123", "living",
    }  # fmt: skip
    files.verify(tmp_path / "living")


def test_a_copy_is_verified_like_the_original(tmp_path: Path) -> None:
    files.copy(write(tmp_path / "x", one=b"abcd"), tmp_path / "y")
    assert files.verify(tmp_path / "y").files == files.verify(tmp_path / "x").files


# fmt: off
WRITING = {
    "write_text", "write_bytes", "mkdir", "makedirs", "rename", "unlink", "rmdir", "rmtree", "touch", "copy2",
    "copyfile", "copytree", "move", "save_file", "symlink_to", "hardlink_to", "NamedTemporaryFile", "mkdtemp",
    "mkstemp", "TemporaryDirectory", "tofile", "save", "savez", "truncate",
}
# fmt: on
"""What writes whatever it is given."""


NO_DATA = ("lock.py", "signals.py")
"""The first holds a file open, the second opens /dev/null."""


def test_no_other_module_writes() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{call.lineno}: {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name not in ("files.py", *NO_DATA)
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and (name := writing(call))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "writes"),
    [
        ("open('x')", False), ("open('x', 'w')", True), ("path.open('ab')", True), ("path.open(mode='xb')", True),
        ("path.open(**o)", True), ("os.open(p, os.O_RDONLY)", False),
        ("os.open(p, os.O_RDWR)", True), ("os.rename(a, b)", True), ("path.rename(b)", True),
        ("text.replace('a', b)", False), ("replace(row, fate=1)", False),
        ("os.replace(a, b)", True), ("path.replace(b)", True), ("staging.write_text('a', b)", False),
        ("path.write_text('a')", True), ("files.write_text(p, t)", False), ("torch.save(x, f)", True),
        ("model.save_pretrained(folder)", True), ("model.save_pretrained(staging.path)", False),
        ("np.memmap(p, np.int32, 'r')", False), ("np.memmap(p, mode='r')", False), ("np.memmap(p)", True),
    ],
)  # fmt: skip
def test_the_search_finds_writing(code: str, writes: bool) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert bool(writing(call)) == writes


def writing(call: ast.Call) -> str:
    """What a call that writes past the room is called, "" for any other."""
    text = ast.unparse(call)
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if owner in ("files", "staging"):
        return ""
    reads = {
        "open": "O_RDONLY" in text if owner == "os" else not writes_by_mode(call),
        "save_pretrained": "staging.path" in text,
        "memmap": "'r'" in text,
        # str.replace and dataclasses.replace are given more than a path.
        "replace": owner != "os" and not (owner and len(call.args) == 1),
    }
    return text if name in WRITING or not reads.get(name, True) else ""


def writes_by_mode(call: ast.Call) -> bool:
    """Whether the mode of a call of `open` lets it write, or cannot be told."""
    modes = [keyword.value for keyword in call.keywords if keyword.arg in ("mode", None)]
    modes += call.args[1:] if isinstance(call.func, ast.Name) else call.args
    return any(not isinstance(mode, ast.Constant) or bool(set("wax+") & set(str(mode.value))) for mode in modes)


# Links, folders of others, what changes after it was verified


def test_nothing_is_written_through_a_link_or_read_by_one(tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_text("mine")
    folder = write(tmp_path / "x", one=b"abcd")
    (folder / "one").unlink()
    for link in (tmp_path / "log", tmp_path / "new", folder / "one"):
        link.symlink_to(outside if link.name != "new" else tmp_path / "made")
    for path in (tmp_path / "log", tmp_path / "new"):
        with pytest.raises(DiskError, match=rf"{path.name}: is a link, and nothing is written through it"):
            files.append(path, b"more")
    files.write_text(tmp_path / "log", "its own")
    with pytest.raises(DamagedError, match="one: "):
        files.copy(folder, tmp_path / "y")
    assert not (tmp_path / "log").is_symlink()
    assert not (tmp_path / "y").exists()
    assert not (tmp_path / "made").exists()
    assert outside.read_text() == "mine"


def test_a_link_on_the_way_in_a_claimed_folder_is_not_gone_through(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with (
        files.claimed(tmp_path / "run", lambda: None),
        pytest.raises(DiskError, match="checkpoints: is a link, and nothing is written through it"),
    ):
        write(tmp_path / "run" / "checkpoints" / "step-000001", one=b"1")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_copy_has_what_deft_wrote_and_verified(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", one=b"abcd", two=b"ef")
    (folder / "more").write_text("of a user's")
    files.copy(folder, tmp_path / "y")
    assert sorted(path.name for path in (tmp_path / "y").iterdir()) == [files.MANIFEST, "one", "two"]
    (folder / "two").write_bytes(b"eg")
    with pytest.raises(DamagedError, match="two: checksum differs"):
        files.copy(folder, tmp_path / "z")
    files.copy(folder, tmp_path / "z", but=("two",))
    assert (tmp_path / "z" / "two").read_bytes() == b"eg"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_modes_are_what_the_umask_leaves_whoever_wrote_the_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with files.staged(tmp_path / "x") as staging:
            staging.write("one", [b"1"])
            os.close(os.open(staging.path / "private", os.O_CREAT, 0o600))
            os.close(os.open(staging.path / "open", os.O_CREAT, 0o777))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()} == {0o666 & ~umask}


def test_a_byte_that_changes_after_the_file_was_verified_is_seen_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK", 4)
    path = write(tmp_path / "x", one=b"abcdefghij") / "one"
    record = files.verify(tmp_path / "x").files["one"]
    found = files.Blocks(path, record)
    for start in range(11):
        for stop in range(start, 11):
            assert found.read(start, stop) == b"abcdefghij"[start:stop]
    for wrong in (b"abcdXfghij", b"abcde"):
        path.write_bytes(wrong)
        assert found.read(0, 4) == b"abcd"
        with pytest.raises(DamagedError, match=r"one: checksum differs \(block 2\)"):
            files.Blocks(path, record).read(7, 10)


def test_without_locks_nothing_is_taken_from_a_writer_that_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.staged(tmp_path / "x") as staging:
        assert files.sweep(tmp_path) == []
        staging.write("one", [b"1"])
    files.verify(tmp_path / "x")


@pytest.mark.parametrize(("number", "is_fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_syncs_no_folders_is_written_to(
    number: int, is_fatal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    if is_fatal:
        with pytest.raises(DiskError):
            files.write_text(tmp_path / "a", "1")
    else:
        files.write_text(tmp_path / "a", "1")
        assert (tmp_path / "a").read_text() == "1"


def test_a_link_out_of_a_model_folder_is_found_and_one_into_a_hub_cache_is_none(tmp_path: Path) -> None:
    hub, model = tmp_path / "models--a--b", tmp_path / "model"
    for each in (hub / "blobs", hub / "snapshots" / "1", model):
        each.mkdir(parents=True)
    for path in (hub / "blobs" / "123", model / "own.json", tmp_path / "secret"):
        path.write_text("{}")
    (hub / "snapshots" / "1" / "config.json").symlink_to("../../blobs/123")
    (model / "config.json").symlink_to("own.json")
    (model / "model.safetensors").symlink_to(tmp_path / "secret")
    assert files.link_outside(hub / "snapshots" / "1") is None
    assert files.link_outside(model) is None
    (model / "LICENSE").symlink_to("../secret")
    assert files.link_outside(model) == model / "LICENSE"


def test_what_is_appended_does_not_reach_another_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\n")
    (tmp_path / "backup").hardlink_to(tmp_path / "log")
    for line in (b"two\n", b"three\n"):
        files.append(tmp_path / "log", line)
    assert (tmp_path / "backup").read_text() == "one\n"
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree\n"
