"""Passwords and tokens never leave this process: what is printed or written goes through `redacted` first."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

MARK = "(hidden)"
_NAME = r"(?:token|secret|password|passwd|passphrase|api_?key|access_?key|private_?key|credentials?)"
_ENVIRONMENT = re.compile(rf"(?:^|_){_NAME}s?$|^PGPASSWORD$", re.IGNORECASE)
_SHORTEST = 8
"""A shorter value in the environment is a setting, or is worth nothing."""

_KEY = rf"(?<![\w-])(?!(?:bos|eos|pad|unk|sep|cls|mask|image|audio|video|start|stop)_)(?:[a-z0-9]+[_-])*{_NAME}"
_VALUE = r"""'[^'\n]*'|"[^"\n]*"|[^\s,;&'"}\])]+"""
_WRITTEN = (
    rf"(?P<a>{_KEY}=)(?:{_VALUE})",
    rf"(?P<b>(?P<quote>['\"]){_KEY}(?P=quote)\s*:\s*)(?:{_VALUE})",
    rf"(?P<c>^\s*{_KEY}:\s+)\S.*$",
)
"""key=value, "key": value, and a line of YAML."""
_ASSIGNED = re.compile("|".join(_WRITTEN), re.IGNORECASE | re.MULTILINE)
_SECRET_KEY = re.compile(_KEY, re.IGNORECASE)
_IN_URL = re.compile(r"\b([a-z][a-z0-9+.-]+:/{1,2})[^/\s@]+@", re.IGNORECASE)
"""A path that was made of an address has one slash less."""
_BY_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16}|xox[abp]-[\w-]{10,})"
    r"|(?<=Bearer )[\w.~+/=-]{8,}"
)


def redacted(text: str) -> str:
    """The text without what looks like a secret, or is one of the environment's or of ~/.netrc.

    >>> redacted("deft train hub_token=abc data.train=https://me:pw@host/a.jsonl microbatch_tokens=64")
    'deft train hub_token=(hidden) data.train=https://(hidden)@host/a.jsonl microbatch_tokens=64'
    """
    for secret in sorted({*_of_environment(), *_of_netrc()}, key=len, reverse=True):
        text = text.replace(secret, MARK)
    text = _BY_SHAPE.sub(MARK, _IN_URL.sub(rf"\1{MARK}@", text))
    return _ASSIGNED.sub(lambda found: (found["a"] or found["b"] or found["c"]) + MARK, text)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters shown, but for tabs and ends of lines: none of a stranger's acts on a terminal.

    >>> visible("a" + chr(27) + "[2Jb")
    'a\\\\x1b[2Jb'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def redacted_json(value: Any) -> Any:
    """JSON without secrets: in its strings, and the values of keys that are called like one.

    >>> redacted_json({"hub": {"token": "abc", "name": "a"}, "eos_token": "</s>"})
    {'hub': {'token': '(hidden)', 'name': 'a'}, 'eos_token': '</s>'}
    """
    if isinstance(value, dict):
        return {key: MARK if _SECRET_KEY.fullmatch(str(key)) else redacted_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_json(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


def _of_environment() -> Iterable[str]:
    return (value for name, value in os.environ.items() if _ENVIRONMENT.search(name) and len(value) >= _SHORTEST)


@cache
def _of_netrc() -> tuple[str, ...]:
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts.values()
    except (OSError, netrc.NetrcParseError):
        return ()
    return tuple(password for _, _, password in hosts if password)
