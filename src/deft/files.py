"""Whole files or none: text is written beside its place and moved there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deft.errors import DiskError


def write_text(path: Path, text: str) -> None:
    """Writes `path` atomically; DiskError names it where that fails."""
    staged = path.with_name(f".{path.name}.new")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror})") from error


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
