"""G4: models that ask for their own code to be run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from deft.encoding import tokenizer
from deft.model import load
from faults import poison
from faults.harness import Result, Scale
from faults.scenes import edit_json

TITLE = "remote code refused, or left unused where transformers has the architecture itself"
FIGURE = 6


def run(scale: Scale) -> Result:
    return poison.thrown(POINTS, _with_kernels)


def control() -> Result:
    """Everything is trusted."""

    def trusting() -> None:
        _with_kernels()
        for auto in (AutoConfig, AutoTokenizer):
            plain = auto.from_pretrained
            auto.from_pretrained = lambda *given, plain=plain, **more: plain(  # type: ignore[method-assign]
                *given, **{**more, "trust_remote_code": True}
            )
        load.AutoConfig, tokenizer.AutoTokenizer = AutoConfig, AutoTokenizer

    return poison.thrown(dict(list(POINTS.items())[:2]), trusting)


def _with_kernels() -> None:
    """A package `kernels` whose every kernel is poison."""
    sys.modules["kernels"] = _Kernels("kernels")  # type: ignore[assignment]


class _Kernels(type(sys)):  # type: ignore[misc]
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        canary = next(
            (Path(word.partition("=")[2]).parent for word in sys.argv if word.startswith("model=")), Path(".")
        )
        return lambda *given, **more: (canary / "canary").touch()


def _asking(
    config: dict[str, Any] | None = None, tokens: dict[str, Any] | None = None
) -> Callable[[Path], Sequence[str]]:
    """A model folder with code.py beside its changed configuration."""

    def plant(folder: Path) -> Sequence[str]:
        model = folder / "model"
        (model / "code.py").write_text(poison.source(folder / "canary"))
        (model / "custom_generate").mkdir()
        (model / "custom_generate" / "generate.py").write_text(poison.source(folder / "canary"))
        edit_json(model / "config.json", **config or {})
        edit_json(model / "tokenizer_config.json", **tokens or {})
        return []

    return plant


CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
POINTS = {
    "auto_map": _asking({"model_type": "mine", "auto_map": CODE}),
    "tokenizer auto_map": _asking(
        tokens={"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.A", "code.B"]}}
    ),
    "auto_map beside a known architecture (left unused)": _asking({"auto_map": CODE}),
    "_attn_implementation_internal": _asking({"_attn_implementation_internal": "someone/kernel"}),
    "attn_implementation": _asking({"attn_implementation": "someone/kernel"}),
    "_experts_implementation": _asking({"_experts_implementation": "someone/kernel"}),
    "nested trust": _asking({"text_config": {"trust_remote_code": True, "auto_map": CODE}}),
    "trust in a configuration that brings another": _asking(
        {"model_type": "lightglue", "trust_remote_code": True, "keypoint_detector_config": {"auto_map": CODE}}
    ),
    "custom generate (left unused)": _asking(),
}
