"""What several tests need: the corpus where it is there, and tokenizers made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CORPUS = Path(os.environ.get("DEFT_CORPUS", Path(__file__).parents[1].parent / "shared" / "corpus"))


@pytest.fixture(scope="session")
def corpus() -> Path:
    if not CORPUS.is_dir():
        pytest.skip("the corpus is not here (set DEFT_CORPUS)")
    return CORPUS
