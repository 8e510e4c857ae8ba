"""Writes the tables of docs/scaling.md, from the formulas of src/deft/run/scaling.py; a test sees that they are so.

python examples/scaling_tables.py [FILE.md]
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from deft.core.files import write_text
from deft.model.config import AdapterConfig
from deft.model.load import inspect, skeleton
from deft.model.trainable import ALL, Trainable
from deft.run import scaling
from deft.run.scaling import Load, Memory, Sizes, StepLayout

DOCS = Path(__file__).parents[1] / "docs" / "scaling.md"
GIB = 2**30
GPUS = (1, 2, 8, 64, 512)
LOAD = Load(tokens=512 * 2048, longest=2048, learnt=1.0, attended=2048)
LORA = Trainable(AdapterConfig(name="lora", r=16))


def _llama(
    width: int, mlp: int, layers: int, heads: int, keys: int, size: int, vocabulary: int, tied: bool
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=size,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def _qwen(
    kind: type[PreTrainedConfig], width: int, mlp: int, layers: int, heads: int, keys: int, vocabulary: int
) -> PreTrainedConfig:
    return kind(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=128,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


MODELS = {
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, 128, 128256, tied=True),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "Qwen3-14B": _qwen(Qwen3Config, 5120, 17408, 40, 40, 8, 151936),
    "Qwen3-32B": _qwen(Qwen3Config, 5120, 25600, 64, 64, 8, 151936),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8, 128, 128256, tied=False),
}
"""As their config.json has them."""
OTHERS = {
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32, 128, 32000, tied=False),
    "Qwen2.5-7B": _qwen(Qwen2Config, 3584, 18944, 28, 28, 4, 152064),
}
"""For published runs."""


@cache
def sizes(name: str, has_lora: bool = False) -> Sizes:
    """From a folder that holds config.json alone."""
    with tempfile.TemporaryDirectory() as folder:
        (MODELS | OTHERS)[name].save_pretrained(folder)
        return Sizes.of(*skeleton(inspect(folder, needs_weights=False), LORA if has_lora else ALL))


def capacity(kind: str, *, has_lora: bool = False) -> Iterator[str]:
    """GiB, shard and tokens/s a GPU of the best shard; a row for each model."""
    gpu = scaling.gpu(kind)
    yield "| model | " + " | ".join(f"{ranks} GPU{'s' if ranks > 1 else ''}" for ranks in GPUS) + " | fewest |"
    yield "|---|" + "--:|" * (len(GPUS) + 1)
    for name in MODELS:
        own = sizes(name, has_lora)
        cells = []
        for ranks in GPUS:
            layouts = [StepLayout(ranks, 8, shard, 0, 0) for shard in scaling.shards(ranks, 8)]
            found = [scaling.way(own, LOAD, gpu, layout) for layout in layouts]
            best = scaling.best(found)
            if best is None:
                cells.append(f"no: {min(way.memory.total for way in found) / GIB:.0f} GiB")
            else:
                rate = LOAD.tokens / ranks / best.seconds.total
                cells.append(
                    f"{best.memory.total / GIB:.0f} GiB, {best.layout.shard}{MARKS[best.layout.mode]}, {rate:,.0f}/s"
                )
        least = scaling.least_ranks(own, LOAD, gpu, StepLayout(1, 8, 1, 0, 0), None)
        yield f"| {name} | {' | '.join(cells)} | {least} |"


MARKS = {"none": "", "selective": " s", "full": " f"}


def example() -> Iterator[str]:
    """What one GPU needs for 8B: 8,192 tokens in one micro-batch, on 1 and on 8 GPUs, on 8 with accumulation."""
    layouts = [StepLayout(ranks, 8, ranks, 8192, 8192, rounds) for ranks, rounds in ((1, 1), (8, 1), (8, 4))]
    found = [scaling.memory(sizes("Llama-3.1-8B"), layout) for layout in layouts]
    yield "| GiB of each GPU | 1 GPU | 8 GPUs | 8 GPUs, 4 rounds |"
    yield "|---|--:|--:|--:|"
    for name in (*Memory.__dataclass_fields__, "total"):
        yield f"| {name.replace('_', ' ')} | " + " | ".join(f"{getattr(each, name) / GIB:.1f}" for each in found) + " |"


def _as_published(memory: Memory) -> Memory:
    return memory


def _pure_bf16(memory: Memory) -> Memory:
    """No low bits, and moments in bf16."""
    return replace(memory, low_bits=0, moments=memory.moments / 2)


@dataclass(frozen=True)
class Published:
    """A run in perf.md's sources: tokens/s and GiB of a GPU, where it has them.

    logits  B of a logit that its loss keeps of all tokens, where it is not in chunks
    state   how its memory differs from ours
    """

    what: str
    model: str
    gpu: str
    layout: StepLayout
    row: int
    rate: float | None = None
    gib: float | None = None
    has_lora: bool = False
    logits: int = 0
    state: Callable[[Memory], Memory] = _as_published


TORCHTITAN = StepLayout(8, 8, 8, 16384, 16384, mode="selective")
TORCHTUNE = StepLayout(1, 1, 1, 8192, 8192)
RUNS = (
    Published("torchtitan, compiled, selective", "Llama-3.1-8B", "h100", TORCHTITAN, 8192, 6667, 77.0, logits=10),
    Published(
        "the same on 128",
        "Llama-3.1-8B",
        "h100",
        replace(TORCHTITAN, ranks=128, shard=128),
        8192,
        6514,
        62.0,
        logits=10,
    ),
    Published(
        "torchtune, compiled, chunked loss", "Llama-3.2-3B", "a100", TORCHTUNE, 4096, 9174, 42.9, state=_pure_bf16
    ),
    Published(
        "and full checkpointing",
        "Llama-3.2-3B",
        "a100",
        replace(TORCHTUNE, mode="full"),
        4096,
        7210,
        24.9,
        state=_pure_bf16,
    ),
    Published("FSDP of IBM and Meta", "Llama-2-7B", "a100", StepLayout(128, 8, 128, 8192, 8192), 4096, 3700),
    Published("AutoModel, LoRA", "Llama-3.1-8B", "h100", replace(TORCHTUNE), 4096, 12473, has_lora=True),
    Published("AutoModel, LoRA", "Qwen2.5-7B", "h100", replace(TORCHTUNE), 4096, 14110, has_lora=True),
    Published(
        "LLaMA-Factory, LoRA, FA2",
        "Llama-2-7B",
        "a100",
        StepLayout(1, 1, 1, 4096, 4096, mode="full"),
        1024,
        2954,
        17 / 1.073741824,
        has_lora=True,
        logits=10,
    ),
)


def published() -> Iterator[str]:
    """Published and predicted, a row a run."""
    yield "| run | model, GPUs | tokens/s a GPU | predicted | off | GiB | predicted | off |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for run in RUNS:
        own, layout = sizes(run.model, run.has_lora), run.layout
        load = Load(layout.tokens * layout.ranks, run.row, 1.0, run.row)
        rate = layout.tokens / scaling.seconds(own, layout, load, scaling.gpu(run.gpu)).total
        moments = [run.state(each(own, layout)) for each in (scaling.begin, scaling.end)]
        if run.logits:
            moments[0] = replace(moments[0], head=run.logits * layout.tokens * own.vocabulary)
        gib = max(each.total for each in moments) / GIB
        where = f"{run.model}, {layout.ranks} {run.gpu.upper()}"
        cells = [*_compared(run.rate, rate, ",.0f"), *_compared(run.gib, gib, ".1f")]
        yield f"| {run.what} | {where} | {' | '.join(cells)} |"


def _compared(known: float | None, predicted: float, form: str) -> tuple[str, str, str]:
    if known is None:
        return "", f"{predicted:{form}}", ""
    return f"{known:{form}}", f"{predicted:{form}}", f"{predicted / known - 1:+.0%}"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "example": example,
    "h100": lambda: capacity("h100"),
    "h200": lambda: capacity("h200"),
    "lora": lambda: capacity("h100", has_lora=True),
    "published": published,
}


def written(text: str) -> str:
    """The page with its tables anew: each stands between <!-- NAME --> and <!-- end -->."""
    for name, table in TABLES.items():
        lines = "\n".join(table())
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, lines=lines: f"{found[1]}{lines}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
        assert count == 1, name
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1]) if sys.argv[1:] else DOCS
    write_text(page, written(page.read_text(encoding="utf-8")))
