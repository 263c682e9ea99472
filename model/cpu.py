"""Fast inference on a CPU: weight formats chosen by measurement, and a decoder layer of few calls.

Few tokens are bound by reading weights and many by arithmetic, so a matrix is kept in more than one format; measurements at
start decide which format serves how many rows.

`float32` and `onednn` are the same numbers, as stored and in oneDNN's layout, which `bfloat16` always has. `int4` keeps
groups of 32 weights as (q - 8) * scale + zero: a matrix quantised in such groups (Q4_1) keeps its values, up to the
rounding of the two constants to bfloat16. `int8` has one scale per row. Both take bfloat16 activations, as `bfloat16` does.
`rounded` is a product in bfloat16 between float32 activations, for an encoder whose other numbers stay float32.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.paged_attention_cpu import decode_attention
from kernels.rows import add_rms_norm, rms_norm, swiglu
from model.flamingo import Flamingo
from model.language_model import Layer, StepContext
from model.layers import RMSNorm, TokenTable

Format = Literal["int4", "int8", "bfloat16", "float32", "onednn", "rounded"]
FLOAT32: tuple[Format, ...] = ("float32", "onednn")
ROUNDED: tuple[Format, ...] = ("rounded",)
GROUP = 32
ROWS = (1, 4, 8, 16, 32)
ROUNDS = 3
# an encoder's products have hundreds of rows: one format for all of them, measured on a few matrices of each shape
ENCODER_ROWS = 256
ENCODER_SAMPLE = 4
# the packed kernels take a multiple of this number of rows
ROW_MULTIPLE = 16
# elements of a matrix, below which rounding does not make it faster
MIN_ROUNDED = 1 << 16


class Product(Protocol):
    """A matrix product [M, K] -> [M, N]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Int4:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        q, self.constants = quantise_groups(weight)
        self.packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
        self.bias = None if bias is None else bias.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.constants)
        return y if self.bias is None else y + self.bias


class Int8:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # the scale is rounded first, and the weights are quantised by the rounded scale
        scale = (weight.float().abs().amax(-1) * (1 + 2**-8) / 127).clamp(min=1e-12).to(torch.bfloat16)
        self.scale = scale
        self.q = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = None if bias is None else bias.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x, self.q, self.scale)
        return y if self.bias is None else y + self.bias


class Plain:
    """Weights as a matrix of `dtype`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OneDNN:
    """Weights of `dtype` in oneDNN's fastest layout, which is computed here once and not in each call."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)
        self.bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def bfloat16(weight: Tensor, bias: Tensor | None) -> Product:
    packs = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (OneDNN if packs else Plain)(weight, bias, torch.bfloat16)


class Rounded:
    """A product in bfloat16, with sums in float32, between activations in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.product = bfloat16(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.to(torch.bfloat16)).float()


FORMATS: dict[Format, Callable[[Tensor, Tensor | None], Product]] = {
    "int4": Int4,
    "int8": Int8,
    "bfloat16": bfloat16,
    "float32": partial(Plain, dtype=torch.float32),
    "onednn": OneDNN,
    "rounded": Rounded,
}


def quantise_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise groups of 32 weights: [N, K] -> q int32 [N, K] in 0..15, and (scale, zero) bfloat16 [K / 32, N, 2].

    The smallest and the largest weight of a group become 0 and 15, as in Q4_1, so that weights from Q4_1 keep their q.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))  # [N, K / 32, 32]
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12)
    q = ((groups - low) / scale).round().clamp(0, 15)
    constants = torch.cat([scale, low + 8 * scale], dim=-1)  # [N, K / 32, 2]
    return q.flatten(-2).to(torch.int32), constants.transpose(0, 1).to(torch.bfloat16).contiguous()


def formats_for(weight: Tensor, requested: Sequence[Format]) -> tuple[Format, ...]:
    """Return the requested formats whose kernel takes a matrix of this shape here; bfloat16 and float32 take any."""
    rows, columns = weight.shape
    fits = {
        "int4": rows % ROW_MULTIPLE == 0 and columns % GROUP == 0,
        "int8": rows % ROW_MULTIPLE == 0 and columns % 16 == 0,
        "onednn": torch.backends.mkldnn.is_available(),
        "rounded": rows * columns >= MIN_ROUNDED,
    }
    fallback: Format = "float32" if set(requested) <= {*FLOAT32, *ROUNDED} else "bfloat16"
    return tuple(name for name in requested if fits.get(name, True)) or (fallback,)


class FastLinear(nn.Module):
    """A linear map without gradients, in several formats; `choose` sets which format serves how many rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, requested: Sequence[Format]) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        names = formats_for(weight, requested)
        bias = None if bias is None else bias.detach()
        self.products: dict[Format, Product] = {name: FORMATS[name](weight.detach(), bias) for name in names}
        self.dtype = torch.float32 if set(names) <= {*FLOAT32, *ROUNDED} else torch.bfloat16
        self._by_rows = [next(reversed(self.products.values()))] * (ROWS[-1] + 1)

    def choose(self, best: dict[int, Format]) -> None:
        """Set the format for each number of rows from `best`, which names one for each of ROWS.

        Numbers between two of ROWS take the smaller one's. From the last of ROWS on, the last format serves, which is the
        fastest in arithmetic. `{ENCODER_ROWS: format}` sets one format for all numbers.
        """
        if ENCODER_ROWS in best:
            self.products = {best[ENCODER_ROWS]: self.products[best[ENCODER_ROWS]]}
            best = dict.fromkeys(ROWS, best[ENCODER_ROWS])
        sizes = [max(r for r in ROWS if r <= max(rows, 1)) for rows in range(ROWS[-1])]
        many = next(reversed(self.products))
        self._by_rows = [self.products[best[size]] for size in sizes] + [self.products[many]]
        used = {*best.values(), many}
        self.products = {name: product for name, product in self.products.items() if name in used}

    def forward(self, x: Tensor) -> Tensor:
        # the packed kernels take only matrices; media are [M, R, D]
        if x.ndim > 2:
            return self(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return self._by_rows[min(x.shape[0], ROWS[-1])](x)


class FastTable(nn.Module):
    """A `TokenTable` with vocabulary and new rows in one matrix, which is multiplied as a `FastLinear`."""

    def __init__(self, table: TokenTable, requested: Sequence[Format]) -> None:
        super().__init__()
        rows = table.weight if table.new_rows is None else torch.cat([table.weight, table.new_rows])
        self.num_rows = len(rows)
        whole = F.pad(rows.detach(), (0, 0, 0, -len(rows) % ROW_MULTIPLE))
        self.product = FastLinear(whole, None, requested)
        self.weight = nn.Parameter(whole.to(self.product.dtype), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        return self.product(x)[:, : self.num_rows]


class DecodeLayer(nn.Module):
    """A Llama-like decoder layer for decode steps: four products, and one kernel call between each two.

    A step of few rows is bound by what runs between its products: operators of torch, modules, and lookups of their
    attributes. This layer looks its parts up once; any other step runs the layer that it wraps.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        attention, feed_forward = layer.attention, layer.feed_forward
        assert isinstance(layer.attention_norm, RMSNorm)
        assert isinstance(layer.ffn_norm, RMSNorm)
        # in tuples, which a module does not register as its own parts
        self._products = attention.qkv, attention.output, feed_forward.up, feed_forward.down
        self._norms = layer.attention_norm.weight, layer.ffn_norm.weight
        self._eps = layer.attention_norm.eps, layer.ffn_norm.eps
        self._scale = attention.head_dim**-0.5

    @staticmethod
    def takes(layer: Layer) -> bool:
        is_llama = isinstance(layer.attention_norm, RMSNorm) and layer.attention.query_norm is None
        return is_llama and not layer.parallel and layer.feed_forward.is_swiglu

    def forward(self, x: Tensor, context: StepContext, kv: Tensor | None) -> Tensor:
        if context.decoding is None or context.cos is None or context.sin is None or kv is None:
            return self.layer(x, context, kv)
        qkv, output, up, down = self._products
        (attention_norm, ffn_norm), (attention_eps, ffn_eps) = self._norms, self._eps
        heads = qkv(rms_norm(x, attention_norm, attention_eps))
        attended = output(decode_attention(heads, context.cos, context.sin, kv, context.decoding, self._scale))
        h, normed = add_rms_norm(x, attended, ffn_norm, ffn_eps)
        return h + down(swiglu(up(normed)))


def measure(linears: Sequence[FastLinear], sizes: Sequence[int] = ROWS) -> dict[int, Format]:
    """Return the fastest format of these matrices of one shape for each number of rows.

    They are multiplied one after the other, as in a step: a single matrix would stay in the processor's cache.
    """
    names = list(linears[0].products)
    if len(names) == 1:
        return dict.fromkeys(sizes, names[0])
    return {
        rows: min(names, key=lambda name: _seconds([x.products[name] for x in linears], rows, linears[0]))
        for rows in sizes
    }


def _seconds(products: Sequence[Product], rows: int, linear: FastLinear) -> float:
    x = torch.randn(rows, linear.shape[1]).to(linear.dtype)
    times: list[float] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for product in products:
            product(x)
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def use_fast_formats(
    model: Flamingo, layers: Sequence[Format], vision: Sequence[Format] = FLOAT32
) -> dict[str, dict[int, Format]]:
    """Put the model's matrices into fast formats, in place, after its gates were folded; return them by matrix shape.

    `layers` are the formats for the decoder's layers. With FLOAT32 all numbers stay; with others, the decoder and the gated
    layers become bfloat16, where gated layers and the output head may also be int8. `vision` are the formats for the
    encoder's linear layers, among FLOAT32 and ROUNDED; its batch norms are folded. The resampler's numbers stay.
    """
    language_model = model.language_model
    gated: Sequence[Format] = FLOAT32 if set(layers) <= set(FLOAT32) else ("int8", "bfloat16")
    fast = _replace(language_model.layers, layers) + _replace(model.gated, gated)
    for name in ("embed", "head"):
        if isinstance(table := getattr(language_model, name), TokenTable):
            fast_table = FastTable(table, gated)
            setattr(language_model, name, fast_table)
            fast.append(fast_table.product)
    for i, layer in enumerate(language_model.layers):
        if isinstance(layer, Layer) and DecodeLayer.takes(layer):
            language_model.layers[i] = DecodeLayer(layer)
    if gated != FLOAT32:
        _to_bfloat16(language_model)
        _to_bfloat16(model.gated)
    model.vision.fold_batch_norms()
    if next(model.vision.parameters()).dtype != torch.float32:  # loaded in the requested dtype
        return _choose(fast)
    chosen = _choose(fast + _replace(model.resampler, FLOAT32))
    return chosen | _choose(_replace(model.vision, vision), encoder=True)


def _replace(module: nn.Module, requested: Sequence[Format]) -> list[FastLinear]:
    linears = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                linears.append(FastLinear(child.weight, child.bias, requested))
                setattr(parent, name, linears[-1])
    return linears


def _to_bfloat16(part: nn.Module) -> None:
    """Convert everything but RMSNorms, whose kernel takes float32 weights with activations of any dtype."""
    for module in part.modules():
        if not isinstance(module, RMSNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)


def _choose(linears: list[FastLinear], *, encoder: bool = False) -> dict[str, dict[int, Format]]:
    """Measure once per shape, and choose the same formats for all matrices of one shape."""
    groups: dict[str, list[FastLinear]] = defaultdict(list)
    for linear in linears:
        name = f"{'x'.join(map(str, linear.shape))} of {'/'.join(linear.products)}"
        groups[f"vision {name}" if encoder else name].append(linear)
    chosen = {
        key: measure(group[:ENCODER_SAMPLE], [ENCODER_ROWS]) if encoder else measure(group)
        for key, group in groups.items()
    }
    for key, group in groups.items():
        for linear in group:
            linear.choose(chosen[key])
    return chosen
