"""Lines of JSON: metrics, evaluations, samples. Each line is whole when it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deft import files


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A file that grows by a line at a time."""

    path: Path

    def write(self, record: Mapping[str, Any]) -> None:
        files.append(self.path, (json.dumps(_finite(record), ensure_ascii=False) + "\n").encode("utf-8"))


def _finite(value: Any) -> Any:
    """NaN and infinity have no place in JSON: they become text.

    >>> _finite({"loss": float("nan")})
    {'loss': 'nan'}
    """
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
