"""The verbs. Nothing heavy is imported before a verb needs it, so that help comes at once."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from deft.errors import DeftError, InputError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Supervised fine-tuning of language models.",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN.YAML] [KEY=VALUE]...", help="a YAML or TOML file, and keys of it that are set here"),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face model folder, such as RUN/final")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a generation setting, such as temperature=0.7")
]


@app.command()
def train(arguments: Overrides = None) -> None:
    """Fine-tune a model on demonstrations: deft train model=... data.train=... output=..."""
    from deft import config
    from deft.run import train as run

    files = [argument for argument in arguments or [] if "=" not in argument]
    if len(files) > 1:
        raise InputError(f"{files[1]}: one configuration file at most; other arguments are key=value")
    overrides = [argument for argument in arguments or [] if "=" in argument]
    run(config.load(files[0] if files else None, overrides))


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts; standard input is one prompt if none")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="do not use the chat template")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="text at which an answer is cut")] = None,
    settings: Settings = None,
) -> None:
    """Write what a model says to prompts, as it comes; greedy unless a sampling setting is given."""
    from deft.generate import run_generate

    texts = prompts or [sys.stdin.read().removesuffix("\n")]
    run_generate(model, texts, "raw" if raw else "auto", _generation(settings), stop or (), stream=True)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    settings: Settings = None,
) -> None:
    """Talk to a model; /reset forgets the conversation, /quit ends it."""
    from deft.generate import run_chat

    run_chat(model, system, _generation(settings))


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="the folder to write to")] = "runs/demo",
) -> None:
    """Train a tiny base model and fine-tune it, on data that deft makes itself: two minutes on two cores."""
    from deft.demo.demo import run

    run(output)


def main() -> None:
    """Runs a verb; what a user can mend is one message and its exit code, never a traceback."""
    # The verbs show their own progress; transformers' bars and advice for its own users would stand between.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A thread of libgomp spins 300,000 times before it sleeps. With two busy neighbours on four cores the demo's base
    # then did 4 steps in 16 s, with 1,000 spins 122; alone it is as fast.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except DeftError as error:
        print(f"deft: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _generation(settings: list[str] | None) -> dict[str, object]:
    from deft.config import setting

    return dict(setting(text) for text in settings or [])
