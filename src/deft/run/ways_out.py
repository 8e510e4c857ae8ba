"""What lets a lost row pass: it is encoded again with one other setting at a time, and those that help are named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from deft.core.errors import InputError
from deft.core.types import Conversation, Fate, Origin
from deft.data import shapes
from deft.data.chunks import Chunk
from deft.data.format import names
from deft.data.shapes import Survey
from deft.dataset import examples
from deft.dataset.refusals import WayOut
from deft.dataset.source import SourceSpec
from deft.run import config as configuration
from deft.run import reading
from deft.run.config import Config
from deft.run.reading import Checked

OF_CHATS = (
    "reasoning=auto",
    "reasoning=empty",
    "template_kwargs.enable_thinking=false",
    "data.train_on=last_assistant",
    "data.learn_reasoning=false",
    "data.learn_tool_calls=false",
    "template=chatml",
    "data.render=raw",
)
OF_LENGTH = ("overflow=turns", "overflow=cut")
NAMED_WAYS = 2


def way_out(config: Config, checked: Checked) -> WayOut:
    """For a row, by its place: the settings that let it pass, in words; nothing where none of those tried does."""
    return partial(_way_out, config, checked)


def _way_out(config: Config, checked: Checked, place: str) -> str:
    try:
        found = _found(checked, Origin.at(place))
        ways = [*islice(_ways(config, checked, *found), NAMED_WAYS)] if found else []
    except (InputError, ValueError):  # the file has gone, or it is a place of another kind
        return ""
    return f"{' or '.join(ways)} lets it pass" if ways else ""


def _found(checked: Checked, origin: Origin) -> tuple[SourceSpec, Survey, Chunk, Origin] | None:
    """The source and the chunk of a row."""
    for source, survey in checked.train + checked.held_out:
        for chunk in source.chunks():
            if chunk.source == origin.source and (origin.line, origin.item) <= chunk.last:
                return source, survey, chunk, origin
    return None


def _ways(
    config: Config, checked: Checked, source: SourceSpec, survey: Survey, chunk: Chunk, origin: Origin
) -> Iterator[str]:
    outcomes = examples.outcomes(source.path, survey.shape, source.choices, (chunk, {}))
    outcome = next(each for each in outcomes if each.origin == origin)
    if outcome.refused:
        refused = sum(1 for each in outcomes if each.refused)
        yield from (f"format: {name}" for name in names() if _refused_by(name, source, chunk) < refused)
        return
    now = [checked.encoder().encode(each) for each in outcome.conversations]
    is_refused = any(row.fate == Fate.REFUSED for row in now)
    for setting in OF_CHATS if is_refused else (f"max_length={_length(checked, outcome.conversations)}", *OF_LENGTH):
        if _passes(config, checked, setting, outcome.conversations):
            yield setting


def _length(checked: Checked, conversations: Sequence[Conversation]) -> int:
    """The tokens of the longest text, where none is too long."""
    unlimited = replace(checked, policy=replace(checked.policy, max_length=2**31)).encoder()
    rows = [unlimited.encode(each) for each in conversations]
    return max((len(part.tokens) for row in rows for example in row.examples for part in example), default=0)


def _passes(config: Config, checked: Checked, setting: str, conversations: Sequence[Conversation]) -> bool:
    """Whether a row is learnt with a setting that is not as it is now."""
    try:
        changed = configuration.changed(config, setting)
        if changed == config:
            return False
        sources = checked.train, checked.held_out
        row_encoder = reading.of(changed, checked.base, checked.tokenizer, *sources).encoder()
        return all(row_encoder.encode(each).examples for each in conversations)
    except InputError:
        return False


def _refused_by(name: str, source: SourceSpec, chunk: Chunk) -> int:
    """How many rows of a chunk a format refuses."""
    found = shapes.Reader(source.path, name, source.choices).each(chunk.read())
    return sum(1 for each in found if each.refused)
