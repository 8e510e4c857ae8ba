"""The equality gate: an arm's loss and gradients against those of plain Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

FP32_LIMIT = 1e-5
FLOOR = 1e-7
"""Of the global norm: below it a tensor's gradient is rounding."""


@dataclass(frozen=True)
class Gate:
    """fp32: relative error of the loss and of the worst tensor's gradient against Hugging Face in fp32. bf16: relative
    error of the whole gradient against the oracle, the arm's and that of Hugging Face's own eager attention."""

    passed: bool
    why: str = ""
    fp32_loss: float | None = None
    fp32_gradient: float | None = None
    bf16_gradient: float | None = None
    bf16_gradient_of_hf: float | None = None

    def __str__(self) -> str:
        if self.fp32_loss is None:
            return f"VOID: {self.why}"
        text = f"fp32 loss {self.fp32_loss:.1e}, worst gradient {self.fp32_gradient:.1e}"
        if self.bf16_gradient is not None:
            text += f"; bf16 gradient {self.bf16_gradient:.1e}, of Hugging Face {self.bf16_gradient_of_hf:.1e}"
        return ("" if self.passed else f"VOID ({self.why}): ") + text


def judge(fp32: Path, bf16: Path | None, hf_fp32: Path, hf_bf16: Path, oracle: Path) -> Gate:
    """Folders with loss.json and gradients.safetensors -> whether the arm computes what it should."""
    exact = load_file(oracle / "gradients.safetensors")
    worst = _worst(load_file(fp32 / "gradients.safetensors"), load_file(hf_fp32 / "gradients.safetensors"))
    loss = abs(_loss(fp32) / _loss(hf_fp32) - 1)
    ours = None if bf16 is None else _whole(load_file(bf16 / "gradients.safetensors"), exact)
    theirs = _whole(load_file(hf_bf16 / "gradients.safetensors"), exact)
    reasons = []
    if not max(worst, loss) <= FP32_LIMIT:
        reasons.append(f"fp32 differs by more than {FP32_LIMIT:g}")
    if ours is not None and not ours <= theirs:
        reasons.append("bf16 is further off than Hugging Face's")
    return Gate(not reasons, "; ".join(reasons), loss, worst, ours, theirs)


def _loss(folder: Path) -> float:
    return json.loads((folder / "loss.json").read_text(encoding="utf-8"))


def _worst(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor."""
    if ours.keys() != theirs.keys():
        return float("inf")
    floor = FLOOR * float(sum(each.double().square().sum() for each in theirs.values()).sqrt())
    return max(float((ours[name] - own).norm()) / max(float(own.norm()), floor) for name, own in theirs.items())


def _whole(ours: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    """The relative error of all gradients as one vector."""
    error = sum(float((ours[name] - own).double().square().sum()) for name, own in exact.items())
    return (error / sum(float(own.double().square().sum()) for own in exact.values())) ** 0.5
