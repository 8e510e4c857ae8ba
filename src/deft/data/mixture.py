"""Several sources in one training set: how often each row of a source stands in an epoch."""

from __future__ import annotations

import numpy as np


def passes(rows: int, times: float, seed: int, source: int) -> np.ndarray:
    """uint16 [rows]: how often each row is learnt per epoch: floor(times), and once more for a share drawn by seed.

    The share is exact to half a row, and the same in every epoch. `source` counts the sources, so that equal files draw
    apart.

    >>> passes(4, 1.5, seed=0, source=0).tolist(), passes(4, 3.0, seed=0, source=0).tolist()
    ([1, 2, 2, 1], [3, 3, 3, 3])
    """
    whole = int(times)
    found = np.full(rows, whole, np.uint16)
    if times > whole:
        order = np.random.Generator(np.random.Philox(key=[seed, source])).permutation(rows)
        found[order[: round((times - whole) * rows)]] += 1
    return found
