"""What the sections of the configuration share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

SWITCHES = {"off": False, "no": False, "false": False, "on": True, "yes": True, "true": True}
"""What YAML reads as True and False, in other files and in Python as text."""


def or_off(value: Any) -> Any:
    """None for what switches something off.

    >>> or_off(0), or_off(False), or_off("off"), or_off(2)
    (None, None, None, 2)
    """
    return None if not SWITCHES.get(str(value).lower(), value) else value


def expanded(value: Any) -> Any:
    """A path with the user's folder in place of `~`.

    >>> expanded("~/a") == os.path.expanduser("~/a"), expanded("a/~")
    (True, 'a/~')
    """
    return os.path.expanduser(value) if isinstance(value, str | Path) else value


OrOff = BeforeValidator(or_off)
PathText = Annotated[str, BeforeValidator(expanded)]


class Section(BaseModel):
    """A frozen model in which an unknown key is an error, and values are taken as they are meant."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        found = as_meant(value, annotation)
        if isinstance(found, str) and any("\ud800" <= each <= "\udfff" for each in found):
            raise ValueError("should be UTF-8 text: give the file or folder another name")
        stop_unless_finite(found if get_origin(annotation) is dict or not isinstance(found, Mapping | list) else None)
        return found


LARGEST, LEAST = 3.4028234663852886e38, 2.0**-149
"""The numbers that fp32 has."""


def stop_unless_finite(value: Any) -> None:
    """Raises ValueError where a number, or one in a mapping or a list, is none that fp32 has but 0.

    >>> stop_unless_finite({"momentum": 1e39})
    Traceback (most recent call last):
    ValueError: should be a finite number, of which fp32 has none above 3.4e+38 or, but for 0, below 1.4e-45
    """
    if isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            stop_unless_finite(each)
    elif isinstance(value, int | float) and value != 0 and not LEAST <= abs(value) <= LARGEST:
        bounds = f"of which fp32 has none above {LARGEST:.1e} or, but for 0, below {LEAST:.1e}"
        raise ValueError(f"should be a finite number, {bounds}")


def as_meant(value: Any, annotation: Any) -> Any:
    """What a value stands for in a field: YAML reads `off` as False and `1e3` as text, and Python writes null as None.

    Raises ValueError for True where a number is due, which Python would take for 1.

    >>> (
    ...     as_meant(False, Literal["off", "config"]),
    ...     as_meant("1e3", int),
    ...     as_meant("2%", float),
    ...     as_meant("None", int | None),
    ... )
    ('off', 1000, 0.02, None)
    """
    kinds = set(kinds_of(annotation))
    if isinstance(value, date) and str in kinds:  # TOML has dates
        return str(value)
    if isinstance(value, str):
        if NoneType in kinds and value.lower() in ("none", "null"):
            return None
        value = value if str in kinds or value in kinds else _number(SWITCHES.get(value.lower(), value), kinds)
    if isinstance(value, bool):
        word = "on" if value else "off"
        if word in kinds:
            return word
        if value and kinds & {int, float} and bool not in kinds:
            raise ValueError("should be a number")
    return value


def kinds_of(annotation: Any) -> Iterator[Any]:
    """The types and the words of a union."""
    if get_origin(annotation) in (Union, UnionType):
        for each in get_args(annotation):
            yield from kinds_of(each)
    elif get_origin(annotation) is Annotated:
        yield from kinds_of(get_args(annotation)[0])
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        yield get_origin(annotation) or annotation


def _number(value: Any, kinds: set[Any]) -> Any:
    """The number that text is, where the field takes one."""
    if not isinstance(value, str) or not kinds & {int, float}:
        return value
    try:
        found = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        return value
    return found if float in kinds else int(found) if found.is_integer() else value


def _as_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from error
    return text


Pattern = Annotated[str, AfterValidator(_as_pattern)]
"""A regular expression."""
