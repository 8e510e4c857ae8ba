"""G1: pickles in every place where a training tool might load one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import write_llama
from transformers import AutoConfig

from deft.model import load, security
from faults import poison
from faults.harness import Result, Scale
from faults.scenes import arguments, ended

TITLE = "poisoned pickles refused or left unused: weights, index, adapter, checkpoint, data, tokenizer"
FIGURE = 12


def run(scale: Scale) -> Result:
    return poison.thrown(dict(list(POINTS.items())[:: scale.of(4, 1, 1)]))


def control() -> Result:
    """Pickled weights are loaded as torch once loaded them."""

    def trusting() -> None:
        plain, from_pretrained = torch.load, load._read
        load._check_folder = lambda folder, needs_weights: None  # type: ignore[assignment]
        security.check_index = lambda path: None  # type: ignore[assignment]
        load.weight_files.stored = lambda folder: {}
        torch.load = lambda *given, **more: plain(*given, **{**more, "weights_only": False})
        load._read = lambda base, dtype, attention: _unsafely(from_pretrained, base, dtype, attention)

    return poison.thrown({name: POINTS[name] for name in ("pytorch_model.bin", "an index of .bin shards")}, trusting)


def _unsafely(read: Callable[..., Any], base: Any, dtype: Any, attention: str) -> Any:
    model = load.multimodal.auto_class(AutoConfig.from_pretrained(base.path))
    return model.from_pretrained(base.path, dtype=dtype, use_safetensors=False, output_loading_info=True)


def _weights(folder: Path) -> Sequence[str]:
    (folder / "model" / "model.safetensors").unlink()
    return _beside("pytorch_model.bin")(folder)


def _index(folder: Path) -> Sequence[str]:
    _weights(folder)
    (folder / "model" / "pytorch_model.bin").rename(folder / "model" / "part.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "part.bin"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / "model" / name).write_text(json.dumps(index))
    (folder / "model" / "other.safetensors").touch()
    return []


def _adapter(folder: Path) -> Sequence[str]:
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(folder / "model"),
        "target_modules": ["q_proj"],
        "r": 2,
    }
    (folder / "model" / "adapter_config.json").write_text(json.dumps(config))
    return _beside("adapter_model.bin")(folder)


def _beside(*names: str) -> Callable[[Path], Sequence[str]]:
    """A pickle of these names in the model's folder."""

    def plant(folder: Path) -> Sequence[str]:
        for name in names:
            (folder / "model" / name).write_bytes(poison.pickled(folder / "canary"))
        return []

    return plant


def _data(name: str, *more: str) -> Callable[[Path], Sequence[str]]:
    """A pickle as training data."""

    def plant(folder: Path) -> Sequence[str]:
        (folder / name).write_bytes(poison.pickled(folder / "canary"))
        return ["train", *arguments(folder, data__train=folder / name), *more]

    return plant


def _numpy(folder: Path) -> Sequence[str]:
    import numpy as np

    np.save(folder / "train.npy", np.array([poison._Poison(folder / "canary")], dtype=object), allow_pickle=True)
    return ["train", *arguments(folder, data__train=folder / "train.npy")]


def _checkpoint(*names: str) -> Callable[[Path], Sequence[str]]:
    """A run that was killed, whose checkpoint has pickles in place of these files."""

    def plant(folder: Path) -> Sequence[str]:
        words = ["train", *arguments(folder, checkpoint__every=2)]
        assert ended(folder, *words).code == 0
        shutil.rmtree(folder / "run" / "final")
        for step in (folder / "run" / "checkpoints").iterdir():
            for pattern in names:
                for path in list(step.glob(pattern)) or [step / pattern]:
                    path.write_bytes(poison.pickled(folder / "canary"))
        return words

    return plant


def _model_is_a_checkpoint(folder: Path) -> Sequence[str]:
    """A folder of torch's distributed checkpoints as the model: `.metadata` is a pickle, and so are bytes entries."""
    other = folder / "distributed"
    write_llama(other)
    (other / "model.safetensors").unlink()
    for name in (".metadata", "__0_0.distcp"):
        (other / name).write_bytes(poison.pickled(folder / "canary"))
    return ["train", *arguments(folder, model=other)]


POINTS: dict[str, Callable[[Path], Sequence[str]]] = {
    "pytorch_model.bin": _weights,
    "an index of .bin shards": _index,
    "adapter_model.bin": _adapter,
    "training_args.bin (left unused)": _beside("training_args.bin"),
    "optimizer.pt, scheduler.pt, rng_state.pth (left unused)": _beside("optimizer.pt", "scheduler.pt", "rng_state.pth"),
    "a checkpoint's weights": _checkpoint("model-*.safetensors"),
    "a checkpoint's optimizer": _checkpoint("optimizer-*.safetensors"),
    "a checkpoint's random state": _checkpoint("random*"),
    "a distributed checkpoint as model": _model_is_a_checkpoint,
    "data.pkl": _data("train.pkl"),
    "a pickle named .jsonl": _data("train.jsonl"),
    "a pickle named .parquet": _data("train.parquet"),
    "a pickle named .arrow": _data("train.arrow"),
    "an object array in .npy": _numpy,
    "a pickle named tokenizer.json": _beside("tokenizer.json"),
    "a pickle named tokenizer.model (left unused)": _beside("tokenizer.model", "vocab.pkl", "tokenizer.pkl"),
}
