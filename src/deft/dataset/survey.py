"""Sources -> surveys: each is read once to know that all of it can be read, and what its rows are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice

from pydantic import TypeAdapter

from deft.core import files, workers
from deft.core.errors import Problem, Problems, collect
from deft.core.files import Staging
from deft.core.types import Message
from deft.data import shapes, sources
from deft.data.readers import hub
from deft.data.shapes import Survey
from deft.dataset import cache as caches
from deft.dataset.cache import Cache
from deft.dataset.source import SourceSpec

Advance = Callable[[int], None]
"""Called with a number of rows, for a progress bar."""

COUNTED_HERE = 32
"""Counting this number of chunks takes less time than worker processes would take to start."""


@dataclass(frozen=True, slots=True)
class Execution:
    """How the work is done; no result depends on it.

    cache      where results are kept; nowhere where it is None
    processes  how many read and encode; as many as there are cores, where it is None
    """

    cache: Cache | None = None
    processes: int | None = None
    advance: Advance = lambda rows: None


FILE = "survey.json"
NAMED_FIELDS = 20
"""How many fields that nothing reads are named in a line; ledger.json names all."""

NOT_KEPT = Execution()
"""By as many processes as there are cores, and kept nowhere."""


def understand(specs: Iterable[SourceSpec], execution: Execution = NOT_KEPT) -> list[tuple[SourceSpec, Survey]]:
    """Reads all sources; every source that cannot be understood is in one error."""
    return _each(specs, lambda source: _surveyed(source, execution))


def glance(specs: Iterable[SourceSpec], execution: Execution = NOT_KEPT) -> list[tuple[SourceSpec, Survey]]:
    """`understand`, where the beginning of a source is enough to know its shape: soon done, however large it is."""
    return _each(specs, lambda source: _glanced(source, execution))


def not_read(surveyed: Iterable[tuple[SourceSpec, Survey]]) -> list[str]:
    """A line for each source whose rows have fields that nothing reads.

    >>> found = Survey("text", 2000, None, (), 0, unread={"id": 2000, "messages[].id": 1})
    >>> not_read([(SourceSpec("a.jsonl"), found)])
    ['a.jsonl: not read: id (2,000 rows), messages[].id (1)']
    """
    return [_not_read(source.path, found) for source, found in surveyed if found.unread]


def _not_read(source: str, found: Survey) -> str:
    (first, rows), *others = found.unread.items()
    named = [f"{first} ({rows:,} row{'s' if rows > 1 else ''})"]
    named += [f"{name} ({rows:,})" for name, rows in others[: NAMED_FIELDS - 1]]
    more = len(found.unread) - len(named)
    where = "" if found.is_whole else f" of the first {found.rows:,} rows"
    return f"{source}: not read{where}: {', '.join(named)}{f' and {more} more' if more else ''}"


def _each(specs: Iterable[SourceSpec], survey: Callable[[SourceSpec], Survey]) -> list[tuple[SourceSpec, Survey]]:
    def surveyed(spec: SourceSpec) -> tuple[SourceSpec, Survey]:
        try:
            source = replace(spec, piped=tuple(spec.chunks())) if spec.path == sources.STDIN else spec
            return source, survey(source)
        except Problems as error:
            first = Problem(spec.path, error.heading.removeprefix(f"{spec.path}: "))
            raise Problems("", [first, *error.problems], error.more) from error

    return collect("the data cannot be read", [partial(surveyed, each) for each in specs])


def _glanced(source: SourceSpec, execution: Execution) -> Survey:
    waiting = source.chunks()
    recipe = (source.path, source.format, source.choices)
    found = shapes.survey(map(shapes.counter(recipe), islice(waiting, workers.HERE)), *recipe)
    if next(waiting, None) is None:
        return found
    return _surveyed(source, execution) if shapes.load(found.shape).left_out else replace(found, is_whole=False)


def _surveyed(source: SourceSpec, execution: Execution) -> Survey:
    stop_if_changed = caches.watch(source.path, source.files())
    content = _content(source)

    def survey() -> Survey:
        found = _survey(source, execution)
        stop_if_changed()
        return found

    if execution.cache is None or not content:
        return replace(survey(), content=content)
    folder, manifest = execution.cache.get(key(source, content), lambda staging: _write(staging, survey()))
    return replace(_AS_JSON.validate_json(files.read(folder / FILE, manifest.files[FILE])), content=content)


def _write(staging: Staging, survey: Survey) -> None:
    """A survey as JSON; of its first conversation the words alone."""
    first = survey.first and replace(
        survey.first, messages=tuple(Message(each.role, each.content) for each in survey.first.messages), tools=()
    )
    with staging.open(FILE) as file:
        file.write(_AS_JSON.dump_json(replace(survey, first=first)))


_AS_JSON = TypeAdapter(Survey)


def _survey(source: SourceSpec, execution: Execution) -> Survey:
    recipe = (source.path, source.format, source.choices)

    def counts() -> Iterator[shapes.ShapeCount]:
        for count in workers.ordered(shapes.counter, recipe, source.chunks(), execution.processes, COUNTED_HERE):
            execution.advance(count.rows)
            yield count

    return shapes.survey(counts(), *recipe)


def _content(source: SourceSpec) -> dict[str, str]:
    """A digest of each file of a source by its name; empty where its rows are in memory, or where it is not known."""
    if not source.is_by_name:
        return {}
    if sources.is_on_the_hub(source.path):
        fingerprint = hub.fingerprint(source.path, source.subset)
        return {source.path: fingerprint} if fingerprint else {}
    return caches.file_digests(source.files())


def key(source: SourceSpec, content: Mapping[str, str]) -> str:
    """The digest of all that a survey depends on."""
    choices = [asdict(source.choices), source.subset, source.max_rows]
    return caches.digest([content, source.path, source.format, _own_code(source.format), choices, caches.code()])


def _own_code(format_name: str) -> str:
    """The digest of the code of a user's own format."""
    if ":" not in format_name:
        return ""
    shapes.load(format_name)
    return caches.own_code(format_name.partition(":")[0])
