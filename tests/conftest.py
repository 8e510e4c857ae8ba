"""What several tests need: the corpus where it is there, and tokenizers made on the spot."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before torch is imported: workers of pytest-xdist with a thread for each core each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# An example's time says more of the machine's load than of the code.
settings.register_profile("deft", deadline=None)
settings.load_profile("deft")

# Under nohup runs ignore SIGHUP, in the background of a script SIGINT, as they should; the tests are about those at a
# terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

CORPUS = Path(os.environ.get("DEFT_CORPUS", Path(__file__).parents[1].parent / "shared" / "corpus"))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing that a test makes is kept among the user's caches."""
    os.environ["DEFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["DEFT_CACHE"])


@pytest.fixture(scope="session")
def corpus() -> Path:
    if not CORPUS.is_dir():
        pytest.skip("the corpus is not here (set DEFT_CORPUS)")
    return CORPUS
