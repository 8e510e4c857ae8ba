"""What transformers and the Hub's client write on their own, while a run shows its own progress."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import utils as hub
from transformers.utils import logging

ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": logging, "HF_HUB_VERBOSITY": hub.logging}
BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
"""Where a user says how much of it they want, which is left as it is."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without their bars, retries and advice while the body runs; afterwards all is as it was.

    >>> before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    >>> with quiet():
    ...     pass
    >>> (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    True
    """
    levels = {each: each.get_verbosity() for name, each in ENVIRONMENT.items() if name not in os.environ}
    has_bars = logging.is_progress_bar_enabled() and BARS not in os.environ
    has_hub_bars = not hub.are_progress_bars_disabled()
    for each in levels:
        each.set_verbosity(logging.ERROR)
    if has_bars:
        logging.disable_progress_bar()  # those of the Hub's client with them
    try:
        with warnings.catch_warnings():
            # Nothing here changes what a sharded layer returns in its place, which torch warns of.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield
    finally:
        for each, level in levels.items():
            each.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
            if not has_hub_bars:
                hub.disable_progress_bars()
