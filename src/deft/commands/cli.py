"""The verbs. Nothing heavy is imported before a verb needs it, so that help comes at once."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from deft.core import signals, versions
from deft.core.errors import DeftError, InputError
from deft.core.redact import redacted, visible
from deft.distributed import watch as ranks

if TYPE_CHECKING:
    from deft.run.config import Config

BEGAN = time.perf_counter()
"""When the command was given."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN.YAML | DATA...] [KEY=VALUE]...", help="a YAML or TOML file, or data files, and keys"),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face model folder, such as RUN/final")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a generation setting, such as temperature=0.7")
]


KEYS = {"ignore_unknown_options": True}
"""Options that a command does not know come as arguments, so that `_config` can say how settings are written."""


def _say_version(is_asked: bool) -> None:
    if is_asked:
        print(f"deft {versions.own()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="say deft's version and leave")
    ] = False,
) -> None:
    """Supervised fine-tuning of language models."""


@app.command(context_settings=KEYS)
def train(arguments: Arguments = None) -> None:
    """Fine-tune a model on demonstrations: deft train data.jsonl model=... output=..."""
    with signals.handled() as handled:
        config = _config(arguments)
        with _imports():
            from deft.run.reading import Session
            from deft.run.train import train as run

        run(config, Session(signals=handled, began=BEGAN, owns_process=True))


@app.command(context_settings=KEYS | {"allow_interspersed_args": False}, add_help_option=False)
def launch(arguments: Annotated[list[str], typer.Argument(metavar="[TORCHRUN'S OPTIONS] train RUN.YAML")]) -> None:
    """Train on several GPUs or machines: deft launch --ranks 8 train run.yaml; torchrun, with deft's exit codes."""
    from deft.commands.launch import run

    raise typer.Exit(run(arguments))


@app.command(context_settings=KEYS)
def check(
    arguments: Arguments = None,
    report: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="write what is found to a file as well")
    ] = None,
    is_timed: Annotated[
        bool, typer.Option("--time", help="load the model, run a few micro-batches, and say how long all steps take")
    ] = False,
    world: Annotated[
        int | None, typer.Option(metavar="N", help="say instead what steps take on N GPUs, by formula", min=1)
    ] = None,
    per_node: Annotated[int, typer.Option(metavar="N", help="GPUs of a node, with --world", min=1)] = 8,
    gpu: Annotated[
        str, typer.Option(metavar="KIND", help="a100, h100 or h200, with --world; and numbers, as h100,infiniband=25")
    ] = "h100",
) -> None:
    """Do everything but train, without weights: exit code 0, or 2 where training would not start."""
    config = _config(arguments)
    if world is not None:
        with _imports():
            from deft.commands.scale import run as scale

        scale(config, world, per_node, gpu, report)
        return
    with _imports():
        from deft.commands.check import run

    run(config, report, is_timed=is_timed)


@app.command(context_settings=KEYS)
def show(
    arguments: Arguments = None,
    rows: Annotated[int | None, typer.Option(metavar="N", help="how many rows (10; 500 on a page)", min=1)] = None,
    only: Annotated[str | None, typer.Option(metavar="FATE", help="rows of one fate, such as refused or cut")] = None,
    source: Annotated[str, typer.Option(metavar="FILE", help="rows of one source: the end of its path")] = "",
    from_line: Annotated[int, typer.Option("--from", metavar="LINE", help="rows from this line on", min=1)] = 1,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="write one self-contained page instead")] = None,
) -> None:
    """Show what is learnt: every token, coloured by its weight. A data file alone needs model=FOLDER, its tokenizer."""
    config = _config(arguments)
    with _imports():
        from deft.commands.show.command import run

    run(config, count=rows, only=only, source=source, from_line=from_line, html=html)


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts; standard input is one prompt if none")] = None,
    is_chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="prompts in the chat template, or as they are; without it as in training"),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="text at which an answer is cut")] = None,
    settings: Settings = None,
) -> None:
    """Write what a model says to prompts, as it comes; greedy unless a sampling setting is given."""
    with _imports():
        from deft.commands.chat import run_generate

    texts = prompts or [sys.stdin.read().removesuffix("\n")]
    run_generate(model, texts, is_chat=is_chat, generate=_generation(settings), stop_sequences=stop or ())


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    settings: Settings = None,
) -> None:
    """Talk to a model; /reset forgets the conversation, /quit ends it."""
    with _imports():
        from deft.commands.chat import run_chat

    run_chat(model, system, _generation(settings))


@app.command()
def replay(folder: Annotated[str, typer.Argument(metavar="RUN/bad-step-N")]) -> None:
    """Run a step again whose loss or gradient was not finite: which row, which layer. Exit code 5 if it is so again."""
    with _imports():
        from deft.commands.replay import run

    run(folder)


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="the folder to write to")] = "runs/demo",
) -> None:
    """Train a tiny base model and fine-tune it, on data that deft makes itself: two minutes on two cores."""
    with _imports():
        from deft.commands.demo.command import run

    run(output)


@app.command()
def doctor() -> None:
    """Say whether this machine is fit: versions, device, memory, disk."""
    with _imports():
        from deft.commands.doctor import run

    run()


def main() -> None:
    """Runs a verb; what a user can mend is one message and its exit code, never a traceback."""
    # The verbs show their own progress; transformers' bars and advice for its own users would stand between.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A thread of libgomp spins 300,000 times before it sleeps, which starves other processes on the same cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # torch then asks for huge pages for tensors of 2 MiB and more.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signals.open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _stop_at_names(sys.argv[1:])
        versions.check_min_versions()
        app()
    except signals.Preempted as stop:
        _leave(stop, str(stop), signals.EXIT_CODE)
    except DeftError as error:
        _leave(error, str(error), error.exit_code)
    except Exception as error:
        from deft.core import crash

        _leave(error, crash.report(error, _run_folder(sys.argv[2:])), DeftError.exit_code)


def _stop_at_names(arguments: list[str]) -> None:
    """InputError for a file whose name would be taken for an option, a setting or standard input, as `*.jsonl` gives.

    >>> _stop_at_names(["a=b.jsonl", "--rows=3", "model=m"])
    """
    for each in arguments:
        if not os.path.lexists(each):
            continue
        key = each.partition("=")[0].strip()
        if each.startswith("-") or ("=" in each and "/" not in key and _is_key(key)):
            what = "is the name of a file here, and would be taken for " + (
                "an option" if each[0] == "-" else "a setting"
            )
            raise InputError(f"{each!r} {what}; write ./{each} for the file, or give it another name")


def _is_key(name: str) -> bool:
    from deft.run import config

    return name.partition(".")[0] in config.Config.model_fields


@contextmanager
def _imports() -> Iterator[None]:
    """Switches garbage collection off: the million objects that imports make all stay, then and later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _leave(error: BaseException, message: str, code: int) -> NoReturn:
    from deft.tracking.console import lasting

    if ranks.speaks(error):
        print(f"deft: {visible(redacted(message))}", file=lasting(sys.stderr))
    sys.exit(code)


def _run_folder(arguments: list[str]) -> Path:
    """The folder of the run that a command line starts, where it has one by now; else the one it was typed in."""
    with suppress(Exception):
        folder = Path(_config([each for each in arguments if not each.startswith("-")]).output or ".")
        return folder if folder.is_dir() else Path(".")
    return Path(".")


def _config(arguments: list[str] | None) -> Config:
    """A configuration file or data files, with key=value -> the configuration."""
    with _imports():
        from deft.run import config

    for number, each in enumerate(arguments or [], 1):
        if each.startswith("-") and each != "-":
            raise InputError(f"{each}: no such option; {_as_setting(each, (arguments or [])[number:])}")
    files = [each for each in arguments or [] if "=" not in each or os.path.lexists(each)]
    overrides = [each for each in arguments or [] if each not in files]
    settings = [file for file in files if file.endswith((".yaml", ".yml", ".toml"))]
    if len(settings) > 1 or (settings and len(files) > 1):
        raise InputError(f"{files[1]}: one configuration file, or data files; other arguments are key=value")
    data = [] if settings or not files else [f"data.train={json.dumps(files)}"]
    return config.load(settings[0] if settings else None, [*data, *overrides], _warn)


def _warn(line: str) -> None:
    from deft.tracking.console import lasting

    if ranks.speaks(None):
        print(f"deft: {visible(redacted(line))}", file=lasting(sys.stderr))


def _as_setting(option: str, following: list[str]) -> str:
    """How to write what another trainer's command line takes as an option."""
    from deft.run import config

    name, equals, value = option.lstrip("-").partition("=")
    value = value if equals else next((each for each in following[:1] if not each.startswith("-")), "true")
    key, known = name.replace("-", "_"), config.keys()
    return f"write {key}={value}" if key in known else f"settings are written key=value; {config.suggestion(key)}"


def _generation(settings: list[str] | None) -> dict[str, object]:
    from deft.run.config import setting

    return dict(setting(text) for text in settings or [])
