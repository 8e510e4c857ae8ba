"""A checkpoint is used where every byte of it is as it was written, and comes after the logs that lead to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deft.core import files, lock
from deft.core.errors import DamagedError
from deft.training import checkpoint, pieces
from deft.training.checkpoint import Checkpoint, Keep
from deft.training.saving import Saver


def state(step: int) -> Checkpoint:
    tensors = {part: {"a": torch.full((4,), float(step))} for part in ("model", "optimizer", "rows")}
    values = {name: {"step": step} for name in ("schedule", "cursor", "inputs", "random-00000")}
    return Checkpoint(step, tensors, values)


def flip(path: Path) -> None:
    """Changes the last byte, which is one of a number: the file can still be read."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("part", ["model", "optimizer", "rows"])
def test_a_changed_number_is_never_used(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 8)
    checkpoint.write(tmp_path, state(3))
    flip(tmp_path / "step-000003" / f"{part}-00001.safetensors")
    with pytest.raises(DamagedError, match=rf"{part}-00001.safetensors: checksum differs"):
        checkpoint.read(tmp_path, 3)


def test_the_newest_sound_one_is_found(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint.write(tmp_path, state(step))
    flip(tmp_path / "step-000100" / "model-00001.safetensors")
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found.checkpoint.step == 10
    assert found.checkpoint.tensors["model"]["a"].tolist() == [10.0] * 4
    assert "Using step-10; 90 steps will be redone" in found.notes[-1]


def test_the_logs_are_on_the_disk_before_the_checkpoint(tmp_path: Path) -> None:
    there: list[list[int]] = []
    with Saver(tmp_path, 1, Keep(1), print) as saver:
        for step in (1, 2):
            saver.begin(state(step), lambda: there.append(checkpoint.steps(tmp_path)))
            assert saver.finish() is None
    assert there == [[], [1]]
    assert checkpoint.steps(tmp_path) == [2]


def test_a_byte_that_changes_after_all_were_verified_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK", 8)
    checkpoint.write(tmp_path, state(3))
    found = checkpoint.read(tmp_path, 3).checkpoint
    assert found.tensors["model"]["a"].tolist() == [3.0] * 4
    for part in ("model", "optimizer", "rows"):
        flip(tmp_path / "step-000003" / f"{part}-00001.safetensors")
        with pytest.raises(DamagedError, match=rf"{part}-00001.safetensors: checksum differs \(block"):
            found.tensors[part]["a"]


def test_tensors_of_every_kind_and_shape_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 8)
    monkeypatch.setattr(pieces, "SHARD", 64)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool)
    shapes = ((), (0, 3), (5,), (2, 3))
    given = {f"{dtype}{shape}": torch.ones(shape).to(dtype) for dtype in dtypes for shape in shapes}
    whole = state(3)
    checkpoint.write(tmp_path, Checkpoint(3, {**whole.tensors, "model": given}, whole.values))
    found = checkpoint.read(tmp_path, 3).checkpoint.tensors["model"]
    assert found.keys() == given.keys()
    for key, tensor in given.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def test_a_folder_that_is_another_s_keeps_its_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with lock.held(run), Saver(run / "checkpoints", 1, Keep(1), print) as saver:
        saver.begin(state(1), lambda: None)
        assert saver.finish() is None
        run.rename(tmp_path / "moved")
        saver.begin(state(2), lambda: None)
        assert "removed or replaced" in str(saver.finish())
    assert not run.exists()
    assert checkpoint.steps(tmp_path / "moved" / "checkpoints") == [1]
