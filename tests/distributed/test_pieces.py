"""A state of which each rank holds rows alone: saved as pieces, restored by any number of ranks, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, run, said
from safetensors import safe_open
from torch import Tensor

from deft.core import files
from deft.core.errors import DamagedError
from deft.distributed import watch
from deft.distributed.notes import Notes
from deft.distributed.owners import owners
from deft.distributed.shards import Rows
from deft.distributed.world import World, joined
from deft.training import checkpoint, pieces
from deft.training.checkpoint import Checkpoint, Keep
from deft.training.pieces import Held
from deft.training.saving import Saver


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 64)


VALUES = {name: {"of": name} for name in ("schedule", "cursor", "inputs", "random-00000")}


def whole() -> dict[str, dict[str, Tensor]]:
    """More and fewer rows than ranks, several dtypes, scalars, and what no rank shares out."""
    torch.manual_seed(0)
    weights = {"weight.a": torch.rand(10, 3), "weight.b": torch.rand(2, 2, 5).bfloat16(), "weight.c": torch.rand(7)}
    state = {
        "low.a": torch.randint(-9, 9, (10, 3), dtype=torch.int16),
        "exp_avg.c": torch.rand(7),
        "steps": torch.tensor(3),
    }
    return {"model": weights | {"buffer.d": torch.rand(4)}, "optimizer": state, "rows": {"digest": torch.arange(5)}}


def dealt(rank: int, shards: int) -> dict[str, Rows]:
    """What FSDP2 gives a rank: torch.chunk's rows; with fewer shards than ranks, they are held several times."""
    found = {}
    for part in ("model", "optimizer"):
        for key, each in whole()[part].items():
            if each.ndim and not key.startswith("buffer"):
                each_has = -(-len(each) // shards)
                start, stop = (min(len(each), (rank % shards + more) * each_has) for more in (0, 1))
                found[key] = Rows(tuple(each.shape), start, stop)
    return found


def held(rows: Mapping[str, Rows], step: int = 2) -> Checkpoint:
    def of_rank(key: str, each: Tensor) -> Tensor:
        return each[rows[key].start : rows[key].stop].clone() if key in rows else each

    tensors = {part: {key: of_rank(key, each) for key, each in own.items()} for part, own in whole().items()}
    return Checkpoint(step, tensors, VALUES, rows=rows)


def saved(world: World, folder: Path, state: Checkpoint) -> str:
    """What was wrong with the save."""
    with Saver(folder, 1, Keep(9), print, world=world) as saver:
        saver.begin(state, lambda: None)
        return str(saver.finish() or "")


def restored(folder: Path, rows: Mapping[str, Rows], world: World, step: int = 2) -> Checkpoint:
    """What a rank has of a checkpoint."""
    found = checkpoint.read(folder, step, world).checkpoint
    tensors = {part: dict(Held(own, rows).items()) for part, own in found.tensors.items()}
    return Checkpoint(found.step, tensors, found.values, rows=rows)


def same(mine: Checkpoint, theirs: Checkpoint) -> bool:
    def described(state: Checkpoint) -> dict[str, Any]:
        tensors = {key: each for own in state.tensors.values() for key, each in own.items()}
        return {key: (each.dtype, each.shape, pieces.bytes_of(each).tobytes()) for key, each in tensors.items()}

    return mine.values == theirs.values and described(mine) == described(theirs)


def files_of(folder: Path, step: int = 2) -> list[str]:
    return sorted(path.name for path in (folder / checkpoint.name(step)).glob("*.safetensors"))


def test_four_two_one_and_three_ranks_restore_each_other_to_the_bit(tmp_path: Path) -> None:
    before = None
    for size in (4, 2, 1, 3):

        def job(world: World, size: int = size, before: Path | None = before) -> list[Any]:
            rows = dealt(world.rank, size)
            mine = restored(before, rows, world) if before else held(rows)
            return [same(mine, held(rows)), saved(world, tmp_path / str(size), mine)]

        assert on_ranks(tmp_path / f"said-{size}", size, job) == [[True, ""]] * size
        before = tmp_path / str(size)
    for size in (4, 2, 1, 3):
        assert same(restored(tmp_path / str(size), {}, World()), held({}))
    assert files_of(tmp_path / "2") == [
        "model-00001-of-rank-00001.safetensors",
        "model-00001.safetensors",
        "optimizer-00001-of-rank-00001.safetensors",
        "optimizer-00001.safetensors",
        "rows-00001.safetensors",
    ]


def test_a_state_of_one_rank_is_saved_in_the_same_bytes_whether_it_is_said_to_be_whole_or_not(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "whole", held({}))
    checkpoint.write(tmp_path / "rows", held(dealt(0, 1)))
    one, other = (files.read_manifest(tmp_path / name / "step-000002") for name in ("whole", "rows"))
    assert one == other


def test_of_ranks_that_hold_the_same_rows_the_lowest_writes_them(tmp_path: Path) -> None:
    """Two copies in two shards, as HSDP has them."""

    def job(world: World) -> list[Any]:
        rows = dealt(world.rank, 2)
        error = saved(world, tmp_path / "run", held(rows))
        return [error, same(restored(tmp_path / "run", rows, world), held(rows))]

    assert on_ranks(tmp_path / "said", 4, job) == [["", True]] * 4
    assert {name.partition("-of-")[2] for name in files_of(tmp_path / "run")} == {"", "rank-00001.safetensors"}
    with safe_open(tmp_path / "run" / "step-000002" / "model-00001-of-rank-00001.safetensors", "pt") as file:
        assert file.metadata() == {"weight.a": "5 of 10", "weight.b": "1 of 2", "weight.c": "4 of 7"}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """The checkpoint of two ranks."""
    folder = tmp_path / "run"
    assert on_ranks(tmp_path / "said-two", 2, lambda world: saved(world, folder, held(dealt(world.rank, 2)))) == [
        "",
        "",
    ]
    return folder


def listed_anew(place: Path, drop: str = "", **copies: str) -> None:
    """A manifest that is right about its files, of which one is dropped, or there under another name as well."""
    manifest = files.read_manifest(place)
    records = {name: asdict(record) for name, record in manifest.files.items() if name != drop}
    for source, target in copies.items():
        name = f"{source}-00001-of-rank-00001.safetensors"
        shutil.copy(place / name, place / target)
        records[target] = records[name]
    (place / files.MANIFEST).write_bytes(files._sealed({"files": records, "about": dict(manifest.about)}))


def test_rows_that_are_missing_or_there_twice_are_named(two: Path) -> None:
    place = two / "step-000002"
    listed_anew(place, model="model-00002.safetensors")
    with pytest.raises(DamagedError, match=r"rows 5:10 of weight.a are there twice"):
        checkpoint.read(two, 2)
    listed_anew(place, drop="model-00002.safetensors")
    assert checkpoint.read(two, 2).checkpoint.step == 2
    listed_anew(place, drop="optimizer-00001.safetensors")
    with pytest.raises(DamagedError, match=r"rows 0:4 of exp_avg.c are missing"):
        checkpoint.read(two, 2)


def test_a_row_that_no_rank_holds_is_not_saved_around() -> None:
    for held_by in ([(0, 3), (4, 5)], [(0, 3), (2, 5)], [(0, 3), None], [None]):
        with pytest.raises(AssertionError, match="a: 5 rows"):
            owners("a", 5, held_by)
    assert owners("a", 0, [(0, 0), (0, 0)]) == ((0, 0, 0),)


def test_a_bit_in_one_ranks_piece_refuses_the_checkpoint_on_all_ranks(two: Path, tmp_path: Path) -> None:
    """Each rank looks at some of the files; what one finds all of them say."""
    checkpoint.write(two, held({}, step=1))
    for number, file in enumerate(files_of(two)):
        path = two / "step-000002" / file
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

        def job(world: World) -> list[Any]:
            found = checkpoint.find(two, world=world)
            assert found is not None
            return [found.checkpoint.step, *found.notes]

        for step, note in on_ranks(tmp_path / f"said-{number}", 3, job):
            assert step == 1
            assert f"{path}: checksum differs" in note
        path.write_bytes(data)
    assert checkpoint.read(two, 2).checkpoint.step == 2


def test_a_bit_that_changes_after_the_look_is_not_used(two: Path) -> None:
    found = checkpoint.read(two, 2).checkpoint.tensors["model"]
    path = two / "step-000002" / "model-00001-of-rank-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedError, match=rf"{path.name}: checksum differs \(block"):
        found["weight.b"]


def test_each_rank_looks_at_its_share_of_the_files(two: Path, tmp_path: Path) -> None:
    def job(world: World) -> list[str]:
        seen: list[str] = []
        plain = files._verify_file
        files._verify_file = lambda path, record: seen.append(path.name) or plain(path, record)  # type: ignore[func-returns-value]
        checkpoint.read(two, 2, world)
        return seen

    one, other = on_ranks(tmp_path / "said", 2, job)
    assert sorted([*one, *other]) == sorted(files.read_manifest(two / "step-000002").files)
    assert abs(len(one) - len(other)) <= 1


def test_a_rank_that_reads_only_its_rows_reads_no_more(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = checkpoint.read(two, 2).checkpoint.tensors["model"], []
    plain = files.Blocks.fill
    monkeypatch.setattr(
        files.Blocks, "fill", lambda self, into, *given: asked.append(given) or plain(self, into, *given)
    )  # type: ignore[func-returns-value]
    mine = Held(found, {"weight.a": Rows((10, 3), 4, 7)})["weight.a"]
    assert torch.equal(mine, whole()["model"]["weight.a"][4:7])
    assert [stop - start for start, stop in asked] == [1 * 12, 2 * 12]
    with pytest.raises(ValueError, match=r"weight.a: \[10, 3\], not \[9, 3\]"):
        Held(found, {"weight.a": Rows((9, 3), 4, 7)})["weight.a"]


class Full(files.Disk):
    def write(self, file: Any, data: memoryview) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_of_any_rank_is_told_and_all_try_again_at_the_same_step(tmp_path: Path) -> None:
    """The loop of two ranks: what rank 1 cannot write is said by rank 0, half an interval later both save again.

    Rank 1 hears of the end of its save two steps after rank 0.
    """

    def job(world: World, folder: Path, full: int) -> list[Any]:
        plain, is_late = Notes.take, threading.Event()

        def take(notes: Notes, name: str) -> Any:
            found = plain(notes, name)
            return found if world.is_first or name != "end" or is_late.wait() else None

        Notes.take = take  # type: ignore[method-assign]
        told: list[str] = []
        begun = []
        with Saver(folder, 4, Keep(9), told.append, world=world) as saver:
            for step in range(1, 9):
                world.sum(torch.zeros(1))  # a step of both
                if saver.is_due(step, 8):
                    files.disk = Full() if (world.rank, step) == (full, 4) else files.Disk()
                    begun.append(step)
                    saver.begin(held(dealt(world.rank, 2), step), lambda: None)
                if step == 6:
                    is_late.set()
                if step == 4 and world.is_first:
                    saver._pool.submit(lambda: None).result()
            error = saver.finish()
        return [begun, told, str(error or ""), saver.newest]

    for full, what in ((1, "rank 1: "), (0, "disk full: step-000004 needs 0.0 MB")):
        folder = tmp_path / str(full)
        (begun, told, error, newest), (other_begun, *_) = on_ranks(
            tmp_path / f"said-{full}", 2, lambda world, folder=folder, full=full: job(world, folder, full)
        )
        assert (begun, error, newest) == (other_begun, "", 8)
        assert begun == [4, 7, 8]
        assert len(told) == 1
        assert what in told[0]
        assert "there is no checkpoint yet. Training goes on, next try at" in told[0]
        assert checkpoint.steps(folder) == begun[1:]
        assert not [path for path in folder.iterdir() if ".deft-" in path.name]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_in_the_middle_of_a_save_leaves_the_one_before(
    lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SILENCE", 4.0)
    folder = tmp_path / "run"

    def job(rank: int) -> None:
        with joined() as world:
            rows = dealt(rank, 2)
            assert saved(world, folder, held(rows, 2)) == ""
            assert world.watch is not None
            world.watch.wait_for(f"beat/{lost}")  # who has given no sign of life is not missed
            plain, count = files.disk.write, iter(range(100))

            def write(file: Any, data: memoryview) -> None:
                if rank == lost and next(count) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                plain(file, data)

            files.disk.write = write  # type: ignore[method-assign]
            saved(world, folder, held(rows, 4))

    codes = run(tmp_path / "said", 2, job)
    assert codes[lost] == -9
    assert codes[1 - lost] == 6, said(tmp_path / "said", 1 - lost)
    assert f"rank {lost} was lost" in said(tmp_path / "said", 1 - lost)
    assert checkpoint.steps(folder) == [2]

    def again(world: World) -> list[Any]:
        if world.is_first:
            files.sweep(folder)
        rows = dealt(world.rank, 3)
        found = checkpoint.find(folder, world=world)
        assert found is not None
        return [found.checkpoint.step, found.notes, same(restored(folder, rows, world), held(rows))]

    assert on_ranks(tmp_path / "again", 3, again) == [[2, (), True]] * 3
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002"]


def test_a_folder_that_a_rank_does_not_see_is_said(tmp_path: Path) -> None:
    def job(world: World) -> str:
        if not world.is_first:
            plain = Path.is_dir
            Path.is_dir = lambda self: plain(self) and ".deft-" not in self.name  # type: ignore[method-assign]
        return saved(world, tmp_path / "run", held(dealt(world.rank, 2)))

    one, other = on_ranks(tmp_path / "said", 2, job)
    assert one == other
    assert "rank 1: " in one
    assert "all ranks need one folder that they share" in one
    assert json.dumps(files_of(tmp_path / "run")) == "[]"


def test_files_are_cut_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SHARD", 32)
    job = lambda world: saved(world, tmp_path / "run", held(dealt(world.rank, 2)))  # noqa: E731
    assert on_ranks(tmp_path / "said", 2, job) == ["", ""]
    assert "model-00002-of-rank-00001.safetensors" in files_of(tmp_path / "run")
    assert same(restored(tmp_path / "run", {}, World()), held({}))
