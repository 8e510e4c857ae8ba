"""Law 4: one place shifts; no target crosses a document's edge."""

from __future__ import annotations

import numpy as np
import torch

from deft.plan.loader import build


def test_two_documents_shift_alone() -> None:
    batch = build(
        [
            (np.array([10, 11, 12, 20, 21, 1]), np.array([0, 0, 0, 1, 1, 1.0])),
            (np.array([30, 31, 32]), np.array([1, 0.5, 0.0])),
        ]
    )
    assert batch.tokens.tolist() == [10, 11, 12, 20, 21, 30]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0]
    assert batch.documents == (5, 1)
    assert batch.rows.tolist() == [2, 3, 4, 5]
    assert batch.targets.tolist() == [20, 21, 1, 31]
    assert batch.weights.tolist() == [1, 1, 1, 0.5]
    assert batch.tokens.dtype == batch.rows.dtype == batch.targets.dtype == torch.int64


def test_the_first_token_of_a_document_is_never_a_target() -> None:
    batch = build([(np.array([5, 6]), np.array([1, 1.0])), (np.array([7, 8]), np.array([1, 1.0]))])
    assert batch.targets.tolist() == [6, 8]


def test_what_follows_the_last_target_is_not_computed() -> None:
    batch = build([(np.arange(10), np.array([0, 0, 1, 0, 0, 0, 0, 0, 0, 0.0]))])
    assert batch.tokens.tolist() == [0, 1]
