"""The models of the benchmarks: real shapes, random weights; and the arithmetic that one step of each needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP. `family` names the transformers architecture."""

    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    is_tied: bool = True
    head_size: int | None = None
    positions: int = 2048

    @property
    def per_head(self) -> int:
        return self.head_size or self.hidden // self.heads

    @property
    def body(self) -> int:
        """Parameters of the layers' matrices, all that the body multiplies by."""
        attention = 2 * self.hidden * self.per_head * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def head(self) -> int:
        """Parameters of the output matrix."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        return self.body + self.head * (1 if self.is_tied else 2)

    def config(self) -> dict[str, Any]:
        """The arguments of transformers' AutoConfig.for_model."""
        return {
            "model_type": self.family,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.per_head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": self.is_tied,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }

    def described(self) -> dict[str, Any]:
        return {**asdict(self), "parameters": self.parameters}


SHAPES = {
    "tiny": Shape("llama", 64, 128, 2, 4, 2, 512),
    "15m": Shape("llama", 288, 768, 6, 6, 6, 32_000),
    "40m": Shape("llama", 512, 1408, 8, 8, 4, 32_000),
    "135m": Shape("llama", 576, 1536, 30, 9, 3, 49_152),
    "0.5b": Shape("llama", 896, 4864, 24, 14, 2, 151_936),
    "3b": Shape("llama", 3072, 8192, 28, 24, 8, 128_256),
    "8b": Shape("llama", 4096, 14_336, 32, 32, 8, 128_256, is_tied=False),
}
"""15m: stories15M of karpathy's llama2.c. 40m: the one that reference figures were taken with. 135m: SmolLM2. 0.5b: the
sizes of Qwen2.5, as a llama without its biases, since transformers puts its own tokenizer in the place of any other
beside a qwen2 model. 3b and 8b: Llama 3."""


def flops(shape: Shape, documents: Iterable[tuple[int, int]], is_adapter: bool = False) -> float:
    """What one forward and backward needs by definition, and nothing else.

    documents   (inputs, targets) of each: the inputs are those up to the one that predicts its last target
    is_adapter  the base is frozen: no gradients of its matrices. The adapter's own products are not counted.

    Three products (two for a frozen base) of every input with the body and of every target with the head, and of each
    input's query with the keys that it sees (forward 4 per pair and channel, backward 2.5 times that). Norms, softmax,
    activation functions and the optimizer are not counted.

    >>> round(flops(SHAPES["40m"], [(207, 132)]) / 207 / 1e9, 2)
    0.21
    """
    width, passes = shape.heads * shape.per_head, 4 if is_adapter else 6
    total = 0.0
    for inputs, targets in documents:
        pairs = inputs * (inputs + 1) / 2
        total += passes * (shape.body * inputs + shape.head * targets) + 14.0 * pairs * width * shape.layers
    return total
