"""A frozen base in 4 or 8 bits: linear layers that keep codes, and make their weights for one product at a time.

nf4   4-bit NormalFloat in blocks of 64, whose scales are 8-bit numbers in blocks of 256 (QLoRA, arXiv 2305.14314), by
      bitsandbytes' kernels: 0.52 bytes a weight
int8  whole numbers up to 127 times the largest weight of a row / 127, activations as they are: 1 byte a weight

bitsandbytes' own layers are not used: Linear4bit packs its weights anew for inference wherever a model in evaluation
mode computes on a CPU, and Linear8bitLt rounds activations, by columns that it finds in the whole batch, so that
documents that are packed together would change each other.
"""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from deft.core.errors import InputError
from deft.model import security
from deft.model.config import Quantize
from deft.model.multimodal import text_body

BLOCK, SCALES_BLOCK = 64, 256
"""As bitsandbytes and QLoRA have them."""


class QuantizedLinear(nn.Linear):
    """A linear layer whose `weight` are codes, which are a buffer as their scales are. Gradients go to its input alone.

    peft takes it for the linear layer it is, and makes DoRA's lengths from what `dequantize` gives.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """What peft looks for before it calls `dequantize`."""
        return self.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in]: a new tensor."""
        raise NotImplementedError

    def forward(self, input_X: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input_X, self)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_X: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(input_X, layer.dequantize(input_X.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None


class NF4Linear(QuantizedLinear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        for name, tensor in _nf4(linear.weight.detach()).items():
            self.register_buffer(name, tensor)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        states: Any = bitsandbytes().functional
        own, count = cast(Any, self), self.out_features * self.in_features
        # One row: bitsandbytes 0.50 takes the wrong blocks on CPUs where the length of rows is no multiple of them.
        inner = states.QuantState(absmax=own.scale_scales, code=own.scale_values, blocksize=SCALES_BLOCK)
        inner.dtype = torch.float32
        outer = states.QuantState(
            absmax=own.scales,
            shape=torch.Size((1, count)),
            dtype=dtype,
            blocksize=BLOCK,
            quant_type="nf4",
            offset=own.offset,
            state2=inner,
        )
        return cast(Tensor, states.dequantize_4bit(self.weight, outer)).view(self.out_features, self.in_features)


class Int8Linear(QuantizedLinear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scales).round_().to(torch.int8))
        self.register_buffer("scales", scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scales: Any = self.scales
        return self.weight.to(dtype).mul_(scales.to(dtype))


KINDS: dict[Quantize, type[QuantizedLinear]] = {"nf4": NF4Linear, "int8": Int8Linear}


def quantize(model: PreTrainedModel, kind: Quantize, device: torch.device | str | None = None) -> None:
    """Every linear layer of the language model's body, not its head, keeps codes from here on. To be called before
    adapters are put in.

    device  where each layer is quantised and stays, if not where it is

    Raises InputError where bitsandbytes is needed and not installed, or the model has no linear layer.
    """
    head = model.get_output_embeddings()
    body = text_body(model)
    found = [(body, name, each) for name, each in body.named_modules() if type(each) is nn.Linear and each is not head]
    if not found:
        raise InputError(f"quantize: {model.config.model_type} has no plain linear layers; leave it out")
    for root, name, layer in found:
        parent, _, own = name.rpartition(".")
        setattr(root.get_submodule(parent), own, KINDS[kind](layer if device is None else layer.to(device)))
    if device is not None:
        model.to(cast(Any, device))


def layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, QuantizedLinear)}


def size(model: nn.Module) -> int:
    """The number of parameters, those that are codes among them."""
    plain = sum(parameter.numel() for parameter in model.parameters())
    return plain + sum(each.in_features * each.out_features for each in layers(model).values())


def code_bytes(model: nn.Module) -> int:
    """What codes and their scales take."""
    return sum(buffer.nbytes for each in layers(model).values() for buffer in each.buffers())


def undo(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Gives each layer the weight it has computed with, in the model's dtype, on the CPU; these by name.

    What is left of the model goes to the CPU as well, which has room where a device may not.
    """
    dtype, made = model.dtype, {}
    for name, layer in layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.dequantize(dtype).cpu(), requires_grad=False)
        plain.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
        made[f"{name}.weight"] = plain.weight
    model.to(cast(Any, "cpu"))
    return made


def bitsandbytes() -> Any:
    """Raises InputError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels that are kept from it
    try:
        with security.without_kernels():
            import bitsandbytes as found
    except ImportError as error:
        raise InputError("quantize: nf4 needs bitsandbytes; pip install 'deft-sft[quant]'") from error
    return found


def _nf4(weight: Tensor) -> dict[str, Tensor]:
    """Codes and scales as bitsandbytes makes them; without values where the weight has none."""
    functions = bitsandbytes().functional
    if weight.device.type == "meta":
        blocks = math.ceil(weight.numel() / BLOCK)
        shapes = {"scale_scales": (math.ceil(blocks / SCALES_BLOCK),), "scale_values": (256,), "offset": ()}
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        codes = torch.empty((math.ceil(weight.numel() / 2), 1), dtype=torch.uint8, device="meta")
        return {**empty, "weight": codes, "scales": torch.empty(blocks, dtype=torch.uint8, device="meta")}
    codes, state = functions.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    assert (state.blocksize, state.state2.blocksize) == (BLOCK, SCALES_BLOCK)
    made = {"scale_scales": state.state2.absmax, "scale_values": state.state2.code, "offset": state.offset}
    return {**made, "weight": codes, "scales": state.absmax}
