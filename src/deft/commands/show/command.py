"""`deft show`: a configuration, or data files and a model, to the terminal or to a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from deft.commands.show import page, rows, terminal
from deft.commands.show.rows import Wanted
from deft.core import files
from deft.core.errors import InputError
from deft.core.types import Fate
from deft.data.shapes import Survey
from deft.dataset.source import SourceSpec
from deft.dataset.survey import not_read
from deft.run.config import Config
from deft.run.reading import Session, execution, read

TERMINAL_ROWS, PAGE_ROWS = 10, 500
"""How many rows are shown unless a number is given."""


def run(
    config: Config,
    *,
    count: int | None = None,
    only: str | None = None,
    source: str = "",
    from_line: int = 1,
    html: str | None = None,
) -> None:
    """Shows what is learnt of the rows of a run; `html` names a page to write instead. Nothing is trained."""
    console = Console()
    wanted = Wanted(count or (PAGE_ROWS if html else TERMINAL_ROWS), _fate(only), source, from_line)
    session = Session(console=console)
    reading = read(config, session)
    session.say(*not_read(reading.train + reading.held_out))
    names = _names(reading.train + reading.held_out)
    if not any(name.endswith(source) for name in names):
        raise InputError(f"--source: no source ends with {source!r}; there are {', '.join(names)}")
    share = config.data.eval if isinstance(config.data.eval, float) else 0.0
    shown = rows.show(
        reading.train, reading.held_out, reading.encoder(), share, config.seed, wanted, execution(session)
    )
    if html is None:
        terminal.write(console, shown)
        return
    template = f"chats by {reading.chosen.where}" if reading.is_chat else "no chat template, as no row has roles"
    files.write_text(Path(html), page.page(shown, {"model": config.model, "template": template}, wanted.count))
    console.print(f"{html}: {shown.extent}", highlight=False, soft_wrap=True, markup=False)


def _names(sources: Sequence[tuple[SourceSpec, Survey]]) -> list[str]:
    """What sources and their files are called."""
    return list(dict.fromkeys(name for source, _ in sources for name in (source.path, *source.files())))


def _fate(only: str | None) -> Fate | None:
    try:
        return None if only is None else Fate(only)
    except ValueError:
        raise InputError(f"--only: {only!r} is no fate; one of {', '.join(Fate)}") from None
