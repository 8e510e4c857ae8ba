"""Why a template cannot render a chat: the order of roles that it wants, found by rendering chats of a word each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

Renders = Callable[[Sequence[str]], bool]
"""Whether messages with these roles, a word each, can be rendered."""


def why(error: Exception, roles: Sequence[str], renders: Renders) -> str:
    """What to tell a user of an error of a template's code; what it raises itself is in its own words.

    >>> why(TypeError("list object has no element 0"), ["assistant"], lambda roles: roles[:1] == ["user"])
    'it cannot show the roles assistant in this order; it begins with user'
    """
    if type(error) is TemplateError:
        return str(error)
    if isinstance(error, SecurityError):
        return f"it does what no sandbox allows, that of transformers neither ({error}); choose another with template="
    if not roles:
        return f"it has no prompt without a message before the answer{_wanted(renders)}"
    if not renders(roles):
        shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        return f"it cannot show the roles {shown} in this order{_wanted(renders)}"
    return f"its code fails on something that the messages hold ({error})"


def _wanted(renders: Renders) -> str:
    begins = {"system": ["system", "user"], "user": ["user"], "assistant": ["assistant"]}
    firsts = [role for role, roles in begins.items() if renders(roles)]
    if not firsts:
        return ""
    in_turn = not renders(["user", "user"]) or not renders(["user", "assistant", "assistant"])
    return f"; it begins with {' or '.join(firsts)}" + (", then user and assistant in turn" if in_turn else "")
