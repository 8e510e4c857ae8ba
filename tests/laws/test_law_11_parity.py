"""Law 11: step-0 loss and gradients equal those of the plain Hugging Face model on the same tokens, -100 on prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    as_batch,
    build,
    causal_lm_of,
    gradients,
    hugging_face,
    largest_error,
    random_documents,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from deft.core.types import MicroBatch
from deft.model import selftest
from deft.model.causal_lm import CausalLM, Mode
from deft.training import chunked

TOLERANCE = 1e-5


def ours(causal_lm: CausalLM, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    if causal_lm.mode == "whole":
        loss = chunked.loss_from_logits(causal_lm.logits(batch), batch.targets, batch.weights)
    else:
        loss = chunked.loss(*causal_lm.hidden_and_head(batch), batch.targets, batch.weights)
    return loss.detach(), gradients(causal_lm.model, loss)


# Each architecture in every mode that is sound for it.
CASES = [
    (name, mode)
    for name, kind in ARCHITECTURES.items()
    for mode in ("packed", "alone", "whole")
    if mode != "packed" or kind.mode == "packed"
]
PACKED = [name for name, mode in CASES if mode == "packed"]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_loss_and_every_gradient_equal_hugging_faces(name: str, mode: Mode) -> None:
    documents = random_documents()
    theirs, their_gradients = hugging_face(build(name), documents, ARCHITECTURES[name].reference)
    loss, our_gradients = ours(causal_lm_of(name, mode), as_batch(documents))

    assert their_gradients.keys() == dict(build(name).named_parameters()).keys()
    assert float(loss) == pytest.approx(float(theirs), rel=TOLERANCE)
    assert largest_error(our_gradients, their_gradients) <= TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_so_do_those_of_a_padded_batch(name: str) -> None:
    documents = random_documents(seed=1)
    theirs, their_gradients = hugging_face(build(name), documents, ARCHITECTURES[name].reference, padded=True)
    loss, our_gradients = ours(causal_lm_of(name, ARCHITECTURES[name].mode), as_batch(documents))
    assert float(loss) == pytest.approx(float(theirs), rel=TOLERANCE)
    assert largest_error(our_gradients, their_gradients) <= TOLERANCE


@pytest.mark.parametrize("name", PACKED)
def test_the_comparison_fails_for_attention_that_ignores_documents(name: str) -> None:
    documents = random_documents()
    _, their_gradients = hugging_face(build(name), documents, ARCHITECTURES[name].reference)
    batch = as_batch(documents)
    _, leaking = ours(causal_lm_of(name, "packed"), replace(batch, documents=(len(batch.tokens),)))
    assert largest_error(leaking, their_gradients) > 100 * TOLERANCE


class OddHead(LlamaForCausalLM):
    """A soft-cap that no config speaks of: invisible on the small logits of a fresh model."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: object) -> CausalLMOutputWithPast:
        logits = 50.0 * torch.tanh(super().forward(input_ids, **kwargs).logits / 50.0)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def odd_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return OddHead(ARCHITECTURES["llama"].config()).eval()


def test_a_head_that_is_not_understood_is_left_to_the_model() -> None:
    documents = random_documents()
    theirs, their_gradients = hugging_face(odd_model(), documents, "sdpa")
    causal_lm = selftest.choose(odd_model())
    loss, our_gradients = ours(causal_lm, as_batch(documents))

    assert causal_lm.mode == "whole"
    assert (
        causal_lm.note
        == "llama: its head scales or caps logits in a way of its own; its own forward computes whole logits"
    )
    assert float(loss) == pytest.approx(float(theirs), rel=TOLERANCE)
    assert largest_error(our_gradients, their_gradients) <= TOLERANCE


def test_the_head_is_made_of_the_parameters_as_they_are_now() -> None:
    causal_lm = causal_lm_of("llama_tied", "packed")
    embedding = causal_lm.model.get_input_embeddings()
    assert causal_lm.head.weight is embedding.weight
    causal_lm.model.set_input_embeddings(nn.Embedding.from_pretrained(embedding.weight.detach() * 2, freeze=False))
    causal_lm.model.tie_weights()
    assert causal_lm.head.weight is causal_lm.model.get_input_embeddings().weight
    assert causal_lm.model.bfloat16() is causal_lm.model
    assert causal_lm.head.weight.dtype == torch.bfloat16
