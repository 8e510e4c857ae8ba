"""Memory, work and traffic of a step by formula: against what the code itself makes, and against hand-made numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from states import state_around
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3Config

from deft.core.errors import InputError
from deft.core.hardware import Machine
from deft.model import attention
from deft.model.causal_lm import CausalLM
from deft.model.checkpointing import Checkpointing
from deft.model.config import AdapterConfig, FreezeConfig
from deft.model.load import inspect, skeleton
from deft.model.trainable import ALL, Trainable
from deft.plan import loader
from deft.run import forecast, scaling
from deft.run.scaling import Count, Load, Sizes, StepLayout
from deft.training import chunked

LORA = Trainable(AdapterConfig(r=8))
SMALL = LlamaConfig(
    vocab_size=2000,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
EIGHT = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
LAYER = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
TABLE = 128256 * 4096
N = 32 * LAYER + 2 * TABLE + 4096
H100 = scaling.gpu("h100")
LOAD = Load(tokens=2**20, longest=2048, learnt=1.0, attended=2048)
ON_ONE = StepLayout(1, 8, 1, 8192, 8192)
Make = Callable[..., Sizes]


@pytest.fixture
def sizes(tmp_path: Path) -> Make:
    """From a folder that holds config.json alone."""

    def make(config: PreTrainedConfig = EIGHT, trainable: Trainable = ALL) -> Sizes:
        config.save_pretrained(tmp_path)
        return Sizes.of(*skeleton(inspect(str(tmp_path), needs_weights=False), trainable))

    return make


# Against what the code makes


@pytest.mark.parametrize("trainable", [ALL, LORA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_that_of_a_real_model_to_the_byte(sizes: Make, dtype: torch.dtype, trainable: Trainable) -> None:
    own = sizes(SMALL, trainable).whole
    model = AutoModelForCausalLM.from_config(SMALL, dtype=dtype, attn_implementation=attention.NAME)
    trainable.apply(model)
    with forecast.LiveBytes() as real:
        for parameter in model.parameters():
            real.see(parameter)
        state = state_around(CausalLM(model, "packed"), dtype)
        held = real.alive
    assert sum(each.numel() for each in state.masters.parameters.values()) == own.trained
    assert scaling.state(own, dtype).total == pytest.approx(held, abs=200)


@pytest.mark.parametrize(("trainable", "mode"), [*product((ALL, LORA), scaling.CHECKPOINTING)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_one_rank_it_is_the_forecast(
    sizes: Make, dtype: torch.dtype, trainable: Trainable, mode: Checkpointing
) -> None:
    """Within what small layers keep beside their products: norms, and rotary tables in fp32."""
    own, machine = sizes(SMALL, trainable), Machine(torch.device("cpu"), dtype, 64)
    batch = loader.build([(np.arange(1100) % 50, np.ones(1100, np.float32))])  # too long to keep probabilities
    is_alone = dtype == torch.float32
    traced = forecast.trace(SMALL, batch, chunked.NLL, machine, is_alone, mode, trainable)
    layout = StepLayout(1, 1, 1, len(batch.tokens), len(batch.targets), 2 - is_alone, mode, dtype, "cpu")
    assert scaling.memory(own, layout).total == pytest.approx(traced.peak_bytes, rel=0.2)
    assert scaling.state(own.whole, dtype).total == pytest.approx(traced.state_bytes, rel=1e-4)


def test_the_wider_the_layers_the_nearer_it_is_to_the_forecast(sizes: Make) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 32000}
    config = LlamaConfig(**{**SMALL.to_dict(), **wide, "head_dim": 64})
    machine, own = Machine(torch.device("cpu"), torch.float32, 64), sizes(config)
    one, two = [loader.build([(np.arange(1100) % 50, np.ones(1100, np.float32))] * count) for count in (1, 2)]
    traces = [forecast.trace(config, batch, chunked.NLL, machine, True) for batch in (one, two)]
    layouts = [StepLayout(1, 1, 1, tokens, tokens, dtype=torch.float32, device="cpu") for tokens in (1099, 2198)]
    assert scaling.memory(own, layouts[1]).total == pytest.approx(traces[1].peak_bytes, rel=0.03)
    kept = [scaling.activations(own, each)[0] + scaling.head(own, each)[0] for each in layouts]
    assert traces[1].kept_bytes - traces[0].kept_bytes == pytest.approx(kept[1] - kept[0], rel=0.03)


def test_the_loss_takes_the_room_that_the_code_takes(sizes: Make) -> None:
    own, machine = sizes(SMALL), Machine(torch.device("cpu"), torch.float32, 64)
    layout = StepLayout(1, 1, 1, 299, 299, 1, "full", torch.float32, "cpu")
    docs = [(np.arange(300) % 50, np.ones(300, np.float32))]
    kept = [
        forecast.trace(config, loader.build(docs), chunked.NLL, machine, True, "full").kept_bytes
        for config in (SMALL, LlamaConfig(**{**SMALL.to_dict(), "vocab_size": 4000}))
    ]
    more = sizes(LlamaConfig(**{**SMALL.to_dict(), "vocab_size": 4000}))
    by_formula = scaling.head(more, layout)[0] - scaling.head(own, layout)[0]
    state = scaling.state(more.whole, torch.float32).total - scaling.state(own.whole, torch.float32).total
    assert kept[1] - kept[0] == pytest.approx(by_formula + state, rel=1e-3)


# Shapes


def test_the_shapes_of_8b_are_those_by_hand(sizes: Make) -> None:
    own = sizes()
    assert (own.layers, own.root) == (Count(32 * LAYER), Count(2 * TABLE + 4096))
    assert (own.largest, own.whole.plain) == (Count(LAYER), N)
    assert own.outputs == (4096 + 2 * 1024) + 4096 + 2 * 14336 + 4096
    assert own.inputs == 4096 + 4096 + 4096 + 14336
    assert 2 * (own.outputs + own.inputs) == 139264  # 139 kB a token and layer
    assert (own.queries, own.attention) == (4096, 6144)


def test_an_adapter_is_trained_and_all_else_frozen(sizes: Make) -> None:
    own, plain = sizes(EIGHT, Trainable(AdapterConfig(r=16))), sizes()
    learnt = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert own.whole == Count(learnt, N)
    assert (own.outputs, own.inputs) == (plain.outputs, plain.inputs + 7 * 16)
    frozen = sizes(EIGHT, Trainable(freeze=FreezeConfig(unfrozen_layers=1)))
    assert frozen.whole.trained == LAYER + TABLE + 4096
    assert frozen.largest.plain == LAYER


@pytest.mark.parametrize(
    "config", [GPT2Config(n_layer=2), Qwen3Config(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)]
)
def test_other_families_are_measured_by_their_products(sizes: Make, config: PreTrainedConfig) -> None:
    own, text = sizes(config), config.get_text_config()
    mlp = 8 * 768 if isinstance(config, GPT2Config) else 3 * text.intermediate_size
    assert own.outputs + own.inputs == 4 * text.hidden_size + own.attention + own.queries + mlp


def test_experts_are_refused_with_what_to_do(sizes: Make) -> None:
    with pytest.raises(InputError, match=r"model: what layers of mixtral keep .*; deft check --time"):
        sizes(MixtralConfig(num_hidden_layers=1))


# Memory


def test_8b_on_one_gpu_and_on_eight_is_what_is_computed_by_hand(sizes: Make) -> None:
    one = scaling.memory(sizes(), ON_ONE)
    tokens, of_one = 8192, 8192 * 2 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert (one.weights, one.low_bits, one.moments) == (2 * N, 2 * N, 8 * N)
    assert one.activations == 32 * tokens * (139264 + 4 * 32) + of_one
    assert one.head == 2 * tokens * 4096 * 2 + 2 * TABLE + 128256 * (2752 * 2 + 523 * 4) - of_one
    assert (one.gradients, one.gathered) == (0, 0)
    assert one.total / 2**30 == pytest.approx(125.8, abs=0.1)
    eight = scaling.memory(sizes(), replace(ON_ONE, ranks=8, shard=8, rounds=4))
    assert (eight.weights, eight.moments, eight.gradients) == (N / 4, N, N / 2)
    assert eight.gathered == 2 * (2 * TABLE + 4096 + 2 * LAYER)
    assert (eight.activations, eight.head) == (one.activations, one.head)


def test_with_few_tokens_the_end_of_a_pass_takes_most(sizes: Make) -> None:
    layout = replace(ON_ONE, tokens=256, targets=256)
    for rounds, width in ((1, 2), (2, 6)):
        assert scaling.memory(sizes(), replace(layout, rounds=rounds)).gradients == width * N
    spread = scaling.memory(sizes(), replace(layout, ranks=8, shard=8))
    assert spread.gradients == 4 * N / 8 + 6 * (2 * TABLE + 4096)


def test_more_ranks_never_need_more_memory_of_each(sizes: Make) -> None:
    own = sizes()
    for mode, tokens, rounds in product(scaling.CHECKPOINTING, (512, 8192), (1, 4)):
        layouts = [StepLayout(ranks, 8, ranks, tokens, tokens, rounds, mode) for ranks in (2, 4, 8, 64, 512)]
        totals = [scaling.memory(own, layout).total for layout in layouts]
        assert all(more > fewer for more, fewer in pairwise(totals)), (mode, tokens, rounds)
    kept = [scaling.activations(own, replace(ON_ONE, mode=mode))[0] for mode in scaling.CHECKPOINTING]
    assert kept[0] > kept[1] > kept[2] == 32 * 8192 * 2 * 4096


def test_codes_stay_whole_on_each_rank(sizes: Make) -> None:
    found = scaling.state(Count(trained=0, frozen=100, codes=1000), torch.bfloat16, shard=4)
    assert astuple(found) == (50 + 1000, 0, 0, 0, 0, 0, 0)


# Time


def test_work_is_that_of_what_is_trained_and_of_what_is_computed_again(sizes: Make) -> None:
    full, lora = sizes().flop, sizes(EIGHT, LORA).flop
    products, squares = 32 * LAYER + 4096, 7 * 32 * 4096 * 2048.0**2
    assert full(2048, 1000, 2048**2) == 6 * (2048 * products + 1000 * TABLE) + squares
    assert full(1, 0, 0, "full") - full(1, 0, 0) == 2 * products
    narrow = lora.layers_trained
    assert lora(1, 1, 0) == 4 * products + 6 * narrow + 4 * TABLE


def test_traffic_is_counted_by_hand(sizes: Make) -> None:
    own, tables = sizes(), 2 * TABLE + 4096
    spread = scaling.traffic(own, replace(ON_ONE, ranks=8, shard=8, rounds=3))
    assert spread.gathers == 3 * 7 / 8 * 2 * (2 * 32 * LAYER + tables)
    assert (spread.scatters, spread.sums) == (3 * 7 / 8 * 4 * N, 0)
    hybrid = scaling.traffic(own, replace(ON_ONE, ranks=32, shard=8))
    assert hybrid.sums == 2 * 3 / 4 * 4 * N / 8
    whole = scaling.traffic(own, replace(ON_ONE, ranks=4))
    assert (whole.gathers, whole.scatters, whole.sums) == (0, 0, 2 * 3 / 4 * 4 * N)


def test_links_are_those_of_a_node_or_between_nodes() -> None:
    assert scaling.link(H100, 8, 8) == 0.8 * 450e9
    assert scaling.link(H100, 64, 8) == 0.8 * 400e9
    assert scaling.link(H100, 8, 1) == 0.8 * 50e9  # the copies of one part


def test_slow_links_bound_a_step_and_fast_ones_do_not(sizes: Make) -> None:
    layout = replace(ON_ONE, ranks=64, shard=64)
    assert scaling.seconds(sizes(), layout, LOAD, H100).bound == "compute"
    slow = scaling.seconds(sizes(), layout, LOAD, scaling.gpu("h100,infiniband=1"))
    assert slow.bound == "communication"
    assert slow.total == slow.communication + slow.update
    rate = scaling.gpu("h100,share=0.3")
    assert scaling.seconds(sizes(), layout, LOAD, rate).compute == pytest.approx(
        2 * scaling.seconds(sizes(), layout, LOAD, H100).compute
    )


def test_a_rank_has_at_least_the_longest_row() -> None:
    assert scaling.busy(Load(4096, 1024, 1.0, 1024), 2) == 2048
    assert scaling.busy(Load(4096, 1024, 1.0, 1024), 64) == 1024


# What fits


def test_the_first_way_that_fits_is_taken(sizes: Make) -> None:
    own, layout = sizes(), replace(ON_ONE, ranks=8, shard=8)
    first = scaling.way(own, LOAD, H100, layout)
    assert (first.fits, first.layout.mode, first.layout.tokens) == (True, "none", 8192)
    assert first.layout.rounds * first.layout.tokens * 8 == 2**20
    larger = scaling.memory(own, replace(first.layout, tokens=16384, targets=16384, rounds=8))
    assert larger.total > (1 - scaling.SPARE) * H100.memory
    asked = scaling.way(own, LOAD, H100, layout, 16384)
    assert (asked.fits, asked.layout.mode, asked.layout.tokens) == (True, "selective", 16384)
    alone = scaling.way(own, LOAD, H100, ON_ONE)
    assert (alone.fits, alone.layout.mode, alone.layout.tokens) == (False, "full", 2048)
    assert scaling.best([alone]) is None


def test_the_fewest_gpus_fit_and_one_less_does_not(sizes: Make) -> None:
    own = sizes()
    least = scaling.least_ranks(own, LOAD, H100, ON_ONE, None)
    assert least == 2
    large = scaling.gpu("h100,memory=40")
    least = scaling.least_ranks(own, LOAD, large, ON_ONE, None)
    assert least is not None
    for ranks, fits in ((least - 1, False), (least, True)):
        assert scaling.way(own, LOAD, large, replace(ON_ONE, ranks=ranks, shard=ranks)).fits is fits
    assert scaling.least_ranks(own, LOAD, scaling.gpu("h100,memory=3"), ON_ONE, None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h1000", "--gpu: 'h1000' is not known; did you mean 'h100'"),
        ("tpu", "there is a100, h100, h200, with memory=GiB"),
        ("h100,memory=0", "'memory=0': memory is a number above 0; write memory=1.5"),
        ("h100,memory", "memory is a number above 0"),
        ("h100,nvlink=fast", "nvlink is a number above 0"),
        ("h100,share=nan", "share is a number above 0"),
        ("h100,colour=1", "--gpu: 'colour=1' is no setting; one is KEY=NUMBER with memory,"),
    ],
)
def test_what_is_no_gpu_is_refused_with_what_would_be(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        scaling.gpu(text)
