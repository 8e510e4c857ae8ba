"""The folder that all arms of a cell read: one model with its weights, one set of rows, one set of settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.shapes import Shape
from common.workloads import EOS, FIRST, PAD, UNKNOWN, Row
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from deft.plan.order import Batching, plan


def write(folder: Path, shape: Shape, rows: Sequence[Row], settings: dict[str, Any]) -> list[Row]:
    """Writes everything but the model's weights, if they are there already; the rows in the order of consumption."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").is_dir():
        write_model(folder / "model", shape)
    (folder / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    write_lines(
        folder / "train.jsonl", [{"prompt": words(row.prompt), "completion": words(row.learnt[:-1])} for row in rows]
    )
    sizes = np.array([len(row.ids) for row in rows], np.int64)
    (epoch,) = plan(sizes, [(0, Batching(examples=settings["examples_per_step"]))], seed=0, epochs=[0])
    order = epoch.order.tolist()
    ordered = [rows[index] for index in order]
    write_lines(folder / "rows.jsonl", [{"input_ids": row.ids, "labels": row.labels} for row in ordered])
    return ordered


def write_lines(path: Path, values: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def write_model(folder: Path, shape: Shape) -> None:
    """Random weights in fp32, and a tokenizer for which the words t3 t4 t5 are the ids 3, 4 and 5."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    arguments = shape.config()
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    word_tokenizer(shape).save_pretrained(folder)


def word_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PAD, "<unknown>": UNKNOWN, "</s>": EOS}
    vocabulary |= {f"t{index}": index for index in range(FIRST, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unknown>"
    )


def words(ids: Sequence[int]) -> str:
    return " ".join(f"t{index}" for index in ids)
