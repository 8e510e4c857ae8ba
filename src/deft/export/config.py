"""`export` in the configuration."""

from __future__ import annotations

from typing import Literal

from deft.core.config import Section

_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class ExportConfig(Section):
    """What `final/` is written in: `auto` is the dtype of the base's weights."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    def dtype_of(self, base: str) -> str:
        """torch's name of the dtype, for a base in `base`.

        >>> ExportConfig().dtype_of("bfloat16"), ExportConfig(dtype="fp32").dtype_of("bfloat16")
        ('bfloat16', 'float32')
        """
        return _NAMES.get(self.dtype, base)
