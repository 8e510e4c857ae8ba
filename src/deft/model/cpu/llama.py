"""Decoder layers of Llama's form, forward and backward by hand: norm, attention with rotary positions, norm, gated MLP.

A layer keeps for its backward pass only what no elementwise operation can make again: its input, queries, keys, values
and probabilities of the attention, the attention's output, the residual stream in the middle, and the gate and up
projections. Norms, rotations and gates are computed again; no matrix product is, but the narrow ones of adapters. Sums
of norms and rotations are in fp32 and rounded once.

A linear layer may have a low-rank adapter, y = x W' + scale (x A') B': it is added to the product where that lies.

Shape suffixes: M tokens of a micro-batch, H hidden size, I size of the MLP, Q query heads, G key/value heads,
R = Q / G, D head size, W = Q * D; of a linear layer X inputs and Y outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from deft.core.hardware import round_up_rows
from deft.distributed.sharding import own_type
from deft.model import adapters
from deft.model.cpu import document_attention
from deft.model.cpu.document_attention import DocumentOrder

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)

PIECE = 2**17
"""Elements that a thread takes through a row of elementwise operations at a time, so that they stay in its cache."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a layer is, beside its weights.

    is_last: its output goes to the head alone. scales: of the adapters of its linear layers, by name.
    """

    head_size: int
    scaling: float
    window: int | None
    eps: float
    head_eps: float | None
    is_last: bool = False
    scales: Mapping[str, float] = field(default_factory=dict)


class Weights(NamedTuple):
    """Biases are None where a layer has none, norms of single heads and adapters likewise."""

    norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    query_a: Tensor | None
    query_b: Tensor | None
    key_a: Tensor | None
    key_b: Tensor | None
    value_a: Tensor | None
    value_b: Tensor | None
    output_a: Tensor | None
    output_b: Tensor | None
    gate_a: Tensor | None
    gate_b: Tensor | None
    up_a: Tensor | None
    up_b: Tensor | None
    down_a: Tensor | None
    down_b: Tensor | None


def form_of(layer: Any) -> Form | None:
    """The form of a layer that this file computes exactly as it stands, or None."""
    if own_type(layer) not in LAYERS:
        return None
    attention, mlp, linear = layer.self_attn, layer.mlp, _linear_layers(layer)
    without_bias = [linear[name] for name in ("output", "gate", "up", "down")]
    if not all(map(_is_known, linear.values())) or any(each.bias is not None for each in without_bias):
        return None
    if type(mlp.act_fn) not in (nn.SiLU, SiLUActivation):
        return None
    norm, head_norm = layer.input_layernorm, getattr(attention, "q_norm", None)
    return Form(
        head_size=attention.head_dim,
        scaling=attention.scaling,
        window=_window(layer),
        eps=norm.variance_epsilon,
        head_eps=None if head_norm is None else head_norm.variance_epsilon,
        scales={name: each.scaling[adapters.NAME] for name, each in linear.items() if adapters.is_adapted(each)},
    )


def _linear_layers(layer: Any) -> dict[str, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
    return {**projections, "output": attention.o_proj, "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}


def _is_known(module: nn.Module) -> bool:
    """Whether it is a plain linear layer, or one with an adapter that is a plain product."""
    return type(module) is nn.Linear or (adapters.is_plain(module) and type(module.base_layer) is nn.Linear)


def forward(
    layer: Any,
    form: Form,
    own: Callable[..., Tensor],
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    documents: tuple[int, ...] | None = None,
    recomputes: bool = False,
    target_rows: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """[1, M, H] -> [1, M, H] over packed documents. All other calls go to `own`, the layer's own forward.

    The last layer, if told the int64 [K] rows that the head is applied to, gives [1, K, H]: the others need no MLP.
    With `recomputes` the gate and up projections and the probabilities are not kept but computed again.
    """
    if documents is None or position_embeddings is None or not _is_plain(layer, hidden_states):
        extra = {} if documents is None else {"documents": documents}
        return own(hidden_states, position_embeddings=position_embeddings, **extra, **kwargs)
    cos, sin = (_wide(table[0]) for table in position_embeddings)
    groups = layer.self_attn.k_proj.out_features // form.head_size
    order = document_attention.document_order(documents, groups, hidden_states.device)
    rows = target_rows if form.is_last else None
    return _Layer.apply(hidden_states[0], form, order, rows, recomputes, cos, sin, *weights_of(layer))[None]


def _window(layer: Any) -> int | None:
    if isinstance(layer, MistralDecoderLayer):
        return layer.self_attn.config.sliding_window
    return getattr(layer.self_attn, "sliding_window", None)


def _has_hooks(layer: nn.Module) -> bool:
    """Whether parts of the layer, which are not called here, have hooks."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules() if part is not layer)


def _is_plain(layer: Any, hidden_states: Tensor) -> bool:
    has_dropout = layer.training and layer.self_attn.attention_dropout > 0.0
    is_cast = hidden_states.dtype != layer.mlp.down_proj.weight.dtype or torch.is_autocast_enabled("cpu")
    is_computed = adapters.are_computed(layer)
    return hidden_states.device.type == "cpu" and not (has_dropout or is_cast or _has_hooks(layer)) and is_computed


def weights_of(layer: Any) -> Weights:
    attention, linear = layer.self_attn, _linear_layers(layer)
    narrow: dict[str, Any] = {}
    for name, module in linear.items():
        narrow[f"{name}_a"], narrow[f"{name}_b"] = adapters.matrices(module)
    return Weights(
        norm=layer.input_layernorm.weight,
        query_bias=attention.q_proj.bias,
        key_bias=attention.k_proj.bias,
        value_bias=attention.v_proj.bias,
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        mlp_norm=layer.post_attention_layernorm.weight,
        **{name: module.weight for name, module in linear.items()},
        **narrow,
    )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_MH: Tensor,
        form: Form,
        order: DocumentOrder,
        rows: Tensor | None,
        recomputes: bool,
        cos_MD: Tensor,
        sin_MD: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        w = Weights._make(weights)
        count = len(input_MH) if rows is None else len(rows)
        rows = _rounded_up(rows)
        inverse_M1, normed_MH = _size_and_norm(input_MH, w.norm, form.eps)
        raw = (_product(normed_MH, "query", w, form), _product(normed_MH, "key", w, form))
        value = order.order(_product(normed_MH, "value", w, form).view(-1, form.head_size))
        query, key = _rotated(raw, w, form, order, cos_MD, sin_MD)
        del normed_MH
        out, kept = document_attention.forward(query, key, value, order, form.window)
        mixed_MW = _at(rows, order.restore(out).view(len(input_MH), -1))
        middle_MH = _product(mixed_MW, "output", w, form, _at(rows, input_MH))
        mlp_inverse_M1, normed_MH = _size_and_norm(middle_MH, w.mlp_norm, form.eps)
        gate_MI, up_MI = _product(normed_MH, "gate", w, form), _product(normed_MH, "up", w, form)
        output_MH = _product(_gated(gate_MI, up_MI), "down", w, form, middle_MH)
        if any(ctx.needs_input_grad):
            attention = (*raw, value) if form.head_eps is not None else (query, key, value)
            recomputable = () if recomputes else (gate_MI, up_MI, *kept)
            norms = (input_MH, inverse_M1, middle_MH, mlp_inverse_M1)
            ctx.save_for_backward(*norms, cos_MD, sin_MD, *weights, *attention, mixed_MW, *recomputable)
            ctx.form, ctx.order, ctx.rows = form, order, rows
        return output_MH[:count]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, ...]:
        form, order, rows, count = ctx.form, ctx.order, ctx.rows, len(grad_MH)
        input_MH, inverse_M1, middle_MH, mlp_inverse_M1, cos_MD, sin_MD, *rest = ctx.saved_tensors
        fields = len(Weights._fields)
        w, needs = Weights._make(rest[:fields]), Weights._make(ctx.needs_input_grad[-fields:])
        query, key, value, mixed_MW, *recomputable = rest[fields:]
        if rows is not None:
            grad_MH, rows = functional.pad(grad_MH, (0, 0, 0, len(rows) - count)), rows[:count]
        grads: dict[str, Tensor | None] = dict.fromkeys(Weights._fields)

        normed_MH = _norm(middle_MH, mlp_inverse_M1, w.mlp_norm)
        projected = (_product(normed_MH, name, w, form) for name in ("gate", "up"))
        gate_MI, up_MI, *kept = recomputable or projected
        d_gate_MI, d_up_MI = _mlp_backward(grad_MH, gate_MI, up_MI, w, needs, form, grads)
        d_normed_MH = _input_gradient(d_up_MI, "up", w, form, _input_gradient(d_gate_MI, "gate", w, form))
        _weight_gradients(d_gate_MI, normed_MH, "gate", w, needs, form, grads)
        _weight_gradients(d_up_MI, normed_MH, "up", w, needs, form, grads)
        del d_gate_MI, d_up_MI
        d_middle_MH, grads["mlp_norm"] = _norm_backward(d_normed_MH, middle_MH, mlp_inverse_M1, w.mlp_norm, grad_MH)

        _weight_gradients(d_middle_MH, mixed_MW, "output", w, needs, form, grads)
        raw = (query, key)
        if form.head_eps is not None:
            query, key = _rotated(raw, w, form, order, cos_MD, sin_MD)
        d_mixed_MW = _spread(rows, _input_gradient(d_middle_MH, "output", w, form), len(input_MH))
        d_out = order.order_gradient(d_mixed_MW.view(-1, *query.shape[1:]))
        d_query, d_key, d_value = document_attention.backward(d_out, query, key, value, kept, order, form.window)
        d_raw_query, grads["query_norm"] = _heads_backward(
            d_query, raw[0], w.query_norm, form, order, cos_MD * form.scaling, sin_MD * form.scaling
        )
        d_raw_key, grads["key_norm"] = _heads_backward(d_key, raw[1], w.key_norm, form, order, cos_MD, sin_MD)
        gradients = (d_raw_query, d_raw_key, order.restore(d_value.to(input_MH.dtype)).view(len(input_MH), -1))
        normed_MH = _norm(input_MH, inverse_M1, w.norm)
        d_normed_MH = _projections_backward(gradients, normed_MH, w, needs, form, grads)
        d_middle_MH = _spread(rows, d_middle_MH, len(input_MH))
        d_input_MH, grads["norm"] = _norm_backward(d_normed_MH, input_MH, inverse_M1, w.norm, d_middle_MH)
        return d_input_MH, *[None] * 6, *grads.values()


def _rounded_up(rows: Tensor | None) -> Tensor | None:
    """The rows and their last one again and again, so that products of them are of few sizes."""
    if rows is None or len(rows) == 0:
        return rows
    return torch.cat([rows, rows[-1:].expand(round_up_rows(len(rows)) - len(rows))])


def _at(rows: Tensor | None, tensor_MX: Tensor) -> Tensor:
    return tensor_MX if rows is None else tensor_MX.index_select(0, rows)


def _spread(rows: Tensor | None, grad_KX: Tensor, count: int) -> Tensor:
    """The gradient of all `count` rows from that of those which `_at` chose, the first of grad_KX."""
    if rows is None:
        return grad_KX
    return grad_KX.new_zeros(count, grad_KX.shape[1]).index_copy_(0, rows, grad_KX[: len(rows)])


def _gated(gate_MI: Tensor, up_MI: Tensor) -> Tensor:
    """silu(gate) * up"""
    product_MI = torch.empty_like(gate_MI)
    for gate_RI, up_RI, product_RI in _parts(gate_MI, up_MI, product_MI):
        torch.ops.aten.silu.out(gate_RI, out=product_RI).mul_(up_RI)
    return product_MI


def _mlp_backward(
    grad_MH: Tensor,
    gate_MI: Tensor,
    up_MI: Tensor,
    w: Weights,
    needs: Weights,
    form: Form,
    grads: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """The gradients of the two projections before the gate; those of the one behind it go into `grads`."""
    d_product_MI = _input_gradient(grad_MH, "down", w, form)
    product_MI, d_up_MI = torch.empty_like(gate_MI), torch.empty_like(gate_MI)
    for d_RI, gate_RI, up_RI, product_RI, d_up_RI in _parts(d_product_MI, gate_MI, up_MI, product_MI, d_up_MI):
        silu_RI = torch.ops.aten.silu.out(gate_RI, out=product_RI)
        torch.mul(d_RI, silu_RI, out=d_up_RI)
        silu_RI.mul_(up_RI)
        torch.ops.aten.silu_backward.grad_input(d_RI.mul_(up_RI), gate_RI, grad_input=d_RI)
    _weight_gradients(grad_MH, product_MI, "down", w, needs, form, grads)
    return d_product_MI, d_up_MI


def _projections_backward(
    gradients: Sequence[Tensor],
    normed_MH: Tensor,
    w: Weights,
    needs: Weights,
    form: Form,
    grads: dict[str, Tensor | None],
) -> Tensor:
    """The gradient of what queries, keys and values are projected from, from theirs."""
    d_normed_MH: Tensor | None = None
    for name, gradient_MW in zip(("query", "key", "value"), gradients, strict=True):
        if getattr(needs, f"{name}_bias"):
            grads[f"{name}_bias"] = gradient_MW.sum(0)
        _weight_gradients(gradient_MW, normed_MH, name, w, needs, form, grads)
        d_normed_MH = _input_gradient(gradient_MW, name, w, form, d_normed_MH)
    assert d_normed_MH is not None
    return d_normed_MH


def _product(input_MX: Tensor, name: str, w: Weights, form: Form, residual_MY: Tensor | None = None) -> Tensor:
    """[M, Y]: what the linear layer `name` makes of its input, added to `residual_MY` where there is one."""
    weight_YX = getattr(w, name)
    if residual_MY is not None:
        output_MY = torch.addmm(residual_MY, input_MX, weight_YX.T)
    else:
        output_MY = functional.linear(input_MX, weight_YX, getattr(w, f"{name}_bias", None))
    if (scale := form.scales.get(name)) is not None:
        a, b = getattr(w, f"{name}_a"), getattr(w, f"{name}_b")
        output_MY.addmm_(torch.mm(input_MX, a.T), b.T, alpha=scale)
    return output_MY


def _input_gradient(grad_MY: Tensor, name: str, w: Weights, form: Form, total_MX: Tensor | None = None) -> Tensor:
    """[M, X]: the gradient of the input of the linear layer `name`, added to `total_MX`, which is used up, if given."""
    weight_YX = getattr(w, name)
    total_MX = torch.mm(grad_MY, weight_YX) if total_MX is None else total_MX.addmm_(grad_MY, weight_YX)
    if (scale := form.scales.get(name)) is not None:
        total_MX.addmm_(torch.mm(grad_MY, getattr(w, f"{name}_b")), getattr(w, f"{name}_a"), alpha=scale)
    return total_MX


def _weight_gradients(
    grad_MY: Tensor,
    input_MX: Tensor,
    name: str,
    w: Weights,
    needs: Weights,
    form: Form,
    grads: dict[str, Tensor | None],
) -> None:
    """Puts the gradients of the weight of the linear layer `name`, and of its adapter, into `grads`."""
    if getattr(needs, name):
        grads[name] = torch.mm(grad_MY.T, input_MX)
    if (scale := form.scales.get(name)) is not None:
        a, b = getattr(w, f"{name}_a"), getattr(w, f"{name}_b")
        grads[f"{name}_a"] = torch.mm(torch.mm(grad_MY, b).T, input_MX).mul_(scale)
        grads[f"{name}_b"] = torch.mm(grad_MY.T, torch.mm(input_MX, a.T)).mul_(scale)


def _rotated(
    raw: tuple[Tensor, Tensor], w: Weights, form: Form, order: DocumentOrder, cos_MD: Tensor, sin_MD: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries, scaled, [P, R, D] and keys [P, D] for the attention, from their projections [M, W] and [M, G * D]."""
    rotated = []
    for projected_MW, weight, scaling in zip(raw, (w.query_norm, w.key_norm), (form.scaling, 1.0), strict=True):
        turned_MW = torch.empty_like(projected_MW)
        for projected_RW, cos_RD, sin_RD, turned_RW in _parts(projected_MW, cos_MD, sin_MD, turned_MW):
            heads_RQD = _wide(projected_RW.view(len(projected_RW), -1, form.head_size))
            if weight is not None:
                assert form.head_eps is not None
                heads_RQD = heads_RQD * _inverse_size(heads_RQD, form.head_eps) * weight
            turned_RW.copy_(_rotate(heads_RQD, cos_RD * scaling, sin_RD * scaling).flatten(1))
        rotated.append(turned_MW)
    query_MW, key_MW = rotated
    query = query_MW.view(len(query_MW) * order.groups, -1, form.head_size)
    return order.order(query), order.order(key_MW.view(-1, form.head_size))


def _heads_backward(
    d_rows: Tensor,
    raw_MW: Tensor,
    weight: Tensor | None,
    form: Form,
    order: DocumentOrder,
    cos_MD: Tensor,
    sin_MD: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of a projection [M, W], in the dtype of raw_MW, from that of the rows [P, ...] that `_rotated` made
    of it; and that of the weight of its norm. raw_MW is the projection, where there is a norm."""
    back_MG = order.back.view(len(cos_MD), order.groups)
    d_raw_MW = raw_MW.new_empty(len(cos_MD), order.groups * d_rows.shape[1:].numel())
    d_weight = cos_MD.new_zeros(form.head_size)
    normed_MW = d_raw_MW if weight is None else raw_MW
    for back_RG, cos_RD, sin_RD, raw_RW, d_raw_RW in _parts(back_MG, cos_MD, sin_MD, normed_MW, d_raw_MW):
        d_heads_RQD = _rotate_back(d_rows.index_select(0, back_RG.flatten()), form, cos_RD, sin_RD)
        if weight is not None:
            d_heads_RQD = _head_norm_backward(d_heads_RQD, raw_RW, weight, form, d_weight)
        d_raw_RW.copy_(d_heads_RQD.flatten(1))
    return d_raw_MW, None if weight is None else d_weight.to(weight.dtype)


def _rotate(heads_MQD: Tensor, cos_MD: Tensor, sin_MD: Tensor) -> Tensor:
    """Rotary positions as transformers has them: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), halves of a head."""
    one, two = heads_MQD.chunk(2, -1)
    sin_one, sin_two = sin_MD[:, None].chunk(2, -1)
    rotated = heads_MQD * cos_MD[:, None]
    first, second = rotated.chunk(2, -1)
    first.addcmul_(two, sin_one, value=-1)
    second.addcmul_(one, sin_two)
    return rotated


def _rotate_back(rows: Tensor, form: Form, cos_MD: Tensor, sin_MD: Tensor) -> Tensor:
    """The gradient before the rotation, fp32 [M, heads, D], from that behind it."""
    grad_MQD = _wide(rows.view(len(cos_MD), -1, form.head_size))
    one, two = grad_MQD.chunk(2, -1)
    sin_one, sin_two = sin_MD[:, None].chunk(2, -1)
    turned = grad_MQD * cos_MD[:, None]
    first, second = turned.chunk(2, -1)
    first.addcmul_(two, sin_two)
    second.addcmul_(one, sin_one, value=-1)
    return turned


def _inverse_size(input_X: Tensor, eps: float) -> Tensor:
    """1 / root mean square over the last dimension, which is kept: in fp32 at least."""
    wide = torch.promote_types(input_X.dtype, torch.float32)
    size = torch.linalg.vector_norm(input_X, dim=-1, keepdim=True, dtype=wide)
    return size.square_().div_(input_X.shape[-1]).add_(eps).rsqrt_()


def _size_and_norm(input_MH: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`_inverse_size` and `_norm`, the input read once."""
    output_MH, weight = torch.empty_like(input_MH), _wide(weight)
    inverse_M1 = torch.empty_like(input_MH[:, :1], dtype=weight.dtype)
    for input_RH, inverse_R1, output_RH in _parts(input_MH, inverse_M1, output_MH):
        wide_RH = _wide(input_RH, copy=True)
        inverse_R1.copy_(_inverse_size(wide_RH, eps))
        output_RH.copy_(wide_RH.mul_(inverse_R1).mul_(weight))
    return inverse_M1, output_MH


def _norm(input_MH: Tensor, inverse_M1: Tensor, weight: Tensor) -> Tensor:
    """input / root mean square * weight, in fp32, rounded once."""
    output_MH, weight = torch.empty_like(input_MH), _wide(weight)
    for input_RH, inverse_R1, output_RH in _parts(input_MH, inverse_M1, output_MH):
        output_RH.copy_(_wide(input_RH, copy=True).mul_(inverse_R1).mul_(weight))
    return output_MH


def _norm_backward(
    grad_MH: Tensor, input_MH: Tensor, inverse_M1: Tensor, weight: Tensor, residual_MH: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of a norm's input, with that of the residual stream beside it added, and of its weight.

    grad_MH, that of its output, may be written to.
    """
    output_MH = torch.empty_like(input_MH)
    d_weight = torch.zeros_like(weight, dtype=inverse_M1.dtype)
    parts = _parts(grad_MH, input_MH, inverse_M1, residual_MH, output_MH)
    for grad_RH, input_RH, inverse_R1, residual_RH, output_RH in parts:
        wide_RH = _wide(input_RH)
        weighted_RH, share_R1 = _unnormed(_wide(grad_RH), wide_RH, inverse_R1, weight, d_weight)
        d_input_RH = _wide(residual_RH, copy=True).addcmul_(weighted_RH, inverse_R1)
        output_RH.copy_(d_input_RH.addcmul_(wide_RH, share_R1))
    return output_MH, d_weight.to(weight.dtype)


def _head_norm_backward(grad_MQD: Tensor, raw_MW: Tensor, weight: Tensor, form: Form, d_weight: Tensor) -> Tensor:
    """The gradient of what a norm of single heads came from (fp32); that of its weight is added to `d_weight`.

    grad_MQD is written to.
    """
    assert form.head_eps is not None
    wide_MQD = _wide(raw_MW.view(grad_MQD.shape))
    inverse_MQ1 = _inverse_size(wide_MQD, form.head_eps)
    weighted_MQD, share_MQ1 = _unnormed(grad_MQD, wide_MQD, inverse_MQ1, weight, d_weight)
    return weighted_MQD.mul_(inverse_MQ1).addcmul_(wide_MQD, share_MQ1)


def _unnormed(grad: Tensor, wide: Tensor, inverse: Tensor, weight: Tensor, d_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of the gradient of a norm's input `wide`, which is weighted * inverse + wide * share: all in fp32.

    weighted  `grad` times the weight, where `grad` was
    share     of each row, from the derivative of `inverse`

    The gradient of the weight is added to `d_weight`.
    """
    product, weight = grad * wide, _wide(weight)
    d_weight.addmv_(product.flatten(0, -2).T, inverse.flatten())
    share = (product @ weight)[..., None].mul_(inverse.pow(3)).div_(-len(weight))
    return grad.mul_(weight), share


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time."""
    rows = max(1, PIECE * torch.get_num_threads() // max(tensor.shape[1:].numel() for tensor in tensors))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _wide(tensor: Tensor, copy: bool = False) -> Tensor:
    """In fp32 at least; with `copy` always in memory of its own."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=copy)
