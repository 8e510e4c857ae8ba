"""Law 12: what trlx's and HALOs' real code gave, where it is no defect; where deft differs, the reason stands here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_loss as reference
import torch
from transformers import PreTrainedTokenizerFast

import deft
from deft.core.types import Head
from deft.training import chunked

HALOS_DIFFERENCES = {
    "multi_turn_generation": "HALOs trains on the user turns of a multi-turn generation (defect 14)",
    "too_long": "HALOs cuts prompts at their head's end, drops the last question, keeps EOS after a cut (10, 11)",
    "budget_tiny": "HALOs empties the question to make it fit (11)",
    "multibyte_cut": "HALOs cuts inside a character (12)",
    "boundary_merge": "HALOs loses the first target token to a merge over the prompt's edge (17)",
    "prompt_ends_in_eos": "HALOs learns the EOS that closes the user's turn (17)",
    "empty_prompt": "HALOs raises IndexError (18)",
    "empty_completion": "deft refuses an assistant message without words (DESIGN promise 2)",
}


@pytest.fixture(scope="module")
def golden(corpus: Path) -> dict[str, Any]:
    return json.loads((corpus / "golden" / "seeds.json").read_text())


def tokenizer(corpus: Path, entry: dict[str, Any]) -> PreTrainedTokenizerFast:
    names = {
        f"{name}_token": text
        for name in ("bos", "eos", "pad")
        for text, _ in [entry["special"][name]]
        if text is not None
    }
    made = PreTrainedTokenizerFast(tokenizer_file=str(corpus / "golden" / entry["path"]), **names)
    if entry["special"]["additional"]:
        made.add_special_tokens({"additional_special_tokens": [text for text, _ in entry["special"]["additional"]]})
    made.chat_template = entry["chat_template"]
    return made


def test_every_trlx_dialogue_is_tokenised_alike(corpus: Path, golden: dict[str, Any]) -> None:
    cases = golden["trlx_tokenize_dialogue"]
    for case in cases:
        made = tokenizer(corpus, golden["tokenizers"][case["tokenizer"]])
        (example,) = deft.encode(
            [case["dialogue"]],
            made,
            max_length=case["max_length"],
            overflow="cut",
            truncation_side=case["truncation_side"],
        )
        assert example.tokens.tolist() == case["out"]["input_ids"], case["id"]
        assert example.labels.tolist() == case["out"]["labels"], case["id"]
    assert len(cases) == 13


def test_trlx_batches_hold_the_same_targets(corpus: Path, golden: dict[str, Any]) -> None:
    """trlx pads to a rectangle, deft packs: without the padding they are the same rows."""
    *cases, strings = golden["trlx_collate"]
    for case in cases:
        made = tokenizer(corpus, golden["tokenizers"][case["tokenizer"]])
        batch = deft.encode(case["dialogues"], made, max_length=case["max_length"], overflow="cut")
        for example, ids, mask, labels in zip(
            batch, case["input_ids"], case["attention_mask"], case["labels_from_loader"], strict=True
        ):
            kept = np.flatnonzero(mask)
            assert example.tokens.tolist() == [ids[i] for i in kept]
            assert example.labels.tolist() == [labels[i] for i in kept]
    made = tokenizer(corpus, golden["tokenizers"][strings["tokenizer"]])
    batch = deft.encode(strings["samples"], made)
    for example, ids, mask in zip(batch, strings["input_ids"], strings["attention_mask"], strict=True):
        kept = [ids[i] for i in np.flatnonzero(mask)]
        assert example.tokens[1 : len(kept) + 1].tolist() == kept, "trlx's strings, between the BOS and EOS it promises"
        assert example.labels[[0, -1]].tolist() == [-100, made.eos_token_id]


def test_every_sound_halos_case_has_the_same_ids_and_labels(corpus: Path, golden: dict[str, Any]) -> None:
    """HALOs learns the last assistant turn alone: train_on=last_assistant."""
    same, differing = 0, set()
    for case in golden["halos_tokenize"]:
        name = case["id"].rpartition("/")[2]
        reason = next((why for key, why in HALOS_DIFFERENCES.items() if key in name), None)
        made = tokenizer(corpus, golden["tokenizers"][case["tokenizer"]])
        if reason is None:
            chat = {"messages": case["prompt"] + case["generation"]}
            (example,) = deft.encode([chat], made, max_length=case["max_length"], train_on="last_assistant")
            labels = case["out"]["labels"]
            assert example.tokens.tolist() == case["out"]["combined_input_ids"][: len(example.tokens)], case["id"]
            assert example.labels.tolist() == labels[: len(example.labels)], case["id"]
            assert set(labels[len(example.labels) :]) <= {-100}, case["id"]
            same += 1
        else:
            differing.add(case["id"])
    assert (same, len(differing)) == (7, 22)


@pytest.mark.parametrize("fast", [chunked, reference])
def test_the_seeds_losses_and_gradients(golden: dict[str, Any], fast: Any) -> None:
    """Their formulas on fixed logits: the token mean over the micro-batch's targets."""
    compared = 0
    for case in golden["trlx_loss"] + golden["halos_loss"]:
        labels = case.get("effective_labels", case.get("labels"))
        if labels is None or case["loss"] == "nan" or "bf16" in case["id"] or "two_certain" in case["id"]:
            continue
        logits = torch.tensor(golden["logits"]["values"], requires_grad=True)
        targets = torch.tensor(labels)[:, 1:]
        learnt = targets != -100
        rows = logits[:, :-1][learnt]
        weights = torch.ones(len(rows))
        loss = fast.loss_from_logits(rows, targets[learnt], weights) / len(rows)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], abs=1e-6), case["id"]
        assert torch.allclose(logits.grad, torch.tensor(case["grad_logits"]), atol=1e-6)
        compared += 1
    assert compared == 2


def test_where_the_seeds_losses_are_defects_deft_gives_the_true_mean(golden: dict[str, Any]) -> None:
    """Certain tokens count (HALOs drops them), and micro-batches are weighted by tokens (HALOs: mean of means)."""
    cases = {case["id"].partition("/")[2]: case for case in golden["halos_loss"]}
    certain = cases["two_certain_tokens"]
    found = _mean(certain["logits"], certain["labels"])
    assert found == pytest.approx(certain["loss_with_all_target_tokens"], abs=1e-6)
    split = cases["grad_accum_or_ranks_of_3"]
    whole = cases["fp32"]
    assert _mean(golden["logits"]["values"], whole["labels"]) == pytest.approx(split["global_token_mean"], abs=1e-6)


def _mean(logits: list[Any], labels: list[Any]) -> float:
    targets = torch.tensor(labels)[:, 1:]
    learnt = targets != -100
    hidden = torch.tensor(logits)[:, :-1][learnt]
    head = Head(torch.eye(hidden.shape[1]))
    return float(chunked.loss(hidden, head, targets[learnt], torch.ones(len(hidden)))) / len(hidden)
