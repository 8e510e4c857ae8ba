"""Weighted negative log-likelihood: -log p(target), what supervised fine-tuning minimises."""

from __future__ import annotations

from deft.training.chunked import NLL, Chunked


def make() -> Chunked:
    return NLL
