"""Fast inference on a CPU: weight formats chosen by measurement, and a decoder layer of one call or of few.

A step of few tokens is limited by reading weights, one of many tokens by arithmetic. So a matrix is kept in more than one
format of `model.products`, and measurements decide which format is used for how many rows.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.decode_attention import decode_attention
from kernels.decoder_layer import LayerWeights, compile_layer, decoder_layer
from kernels.rows import add_rms_norm, rms_norm, swiglu
from model.flamingo import Flamingo
from model.language_model import Layer, StepContext
from model.layers import RMSNorm, TokenTable
from model.products import FLOAT32, FORMATS, ROUNDED, ROW_MULTIPLE, Format, IntegerProduct, Product, formats_for

# the format by number of rows, and the choices of all matrices by `FastLinear.key`
Choice = dict[int, Format]
Choices = dict[str, Choice]
ROWS = (1, 4, 8, 16, 32)
# from this number of rows on, the last format is used, which has the fastest arithmetic
MANY_ROWS = 64
# for each smaller number of rows, the measured number whose format is used
MEASURED_ROWS = [max(measured for measured in ROWS if measured <= max(rows, 1)) for rows in range(MANY_ROWS)]
ROUNDS = 5
# seconds after which no further round begins: on a busy machine a round takes many times longer
MAX_SECONDS = 5.0
# an encoder's products have hundreds of rows: one format for all of them, measured on a few matrices of each shape
ENCODER_ROWS = 256
ENCODER_SAMPLE = 4


class FastLinear(nn.Module):
    """A linear map without gradients, in several formats; `choose` sets which format is used for how many rows.

    `key` names its shape and formats. If `known` holds a choice for it, only the formats of that choice are packed.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        requested: Sequence[Format],
        known: Choices | None = None,
        role: str = "",
    ) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        names = formats_for(weight, requested)
        self.key = f"{role}{'x'.join(map(str, self.shape))} of {'/'.join(names)}"
        self.choice = known.get(self.key) if known else None
        bias = None if bias is None else bias.detach()
        packed = names if self.choice is None else _used(names, self.choice)
        self.products: dict[Format, Product] = {name: FORMATS[name](weight.detach(), bias) for name in packed}
        self.dtype = torch.float32 if set(names) <= {*FLOAT32, *ROUNDED} else torch.bfloat16
        self._by_rows = [next(reversed(self.products.values()))] * (MANY_ROWS + 1)
        if self.choice is not None:
            self.choose(self.choice)

    def choose(self, choice: Choice) -> None:
        """Set the format for each number of rows from `choice`, which names one for each of ROWS.

        A number between two of ROWS uses the format of the smaller one, and from `MANY_ROWS` on the last format is used.
        `{ENCODER_ROWS: format}` sets one format for all numbers.
        """
        used = _used(tuple(self.products), choice)
        self.choice, self.products = choice, {name: self.products[name] for name in used}
        many = self.products[used[-1]]
        if ENCODER_ROWS in choice:
            self._by_rows = [many] * (MANY_ROWS + 1)
            return
        self._by_rows = [self.products[choice[rows]] for rows in MEASURED_ROWS] + [many]

    def product(self, num_rows: int) -> Product:
        """Return the product that is used for this number of rows."""
        return self._by_rows[min(num_rows, MANY_ROWS)]

    def forward(self, x: Tensor) -> Tensor:
        # the packed kernels accept only matrices; media are [M, R, D]
        if x.ndim > 2:
            return self(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return self.product(x.shape[0])(x)


def _used(names: tuple[Format, ...], choice: Choice) -> tuple[Format, ...]:
    """Return the formats that a choice uses: its own and, unless it is an encoder's, the last one, for many rows."""
    used = {*choice.values()} if ENCODER_ROWS in choice else {*choice.values(), names[-1]}
    return tuple(name for name in names if name in used)


class FastTable(nn.Module):
    """A `TokenTable` with vocabulary and new rows in one matrix, which is multiplied as a `FastLinear`."""

    def __init__(self, table: TokenTable, requested: Sequence[Format], known: Choices | None = None) -> None:
        super().__init__()
        rows = table.weight if table.new_rows is None else torch.cat([table.weight, table.new_rows])
        self.num_rows = len(rows)
        whole = F.pad(rows.detach(), (0, 0, 0, -len(rows) % ROW_MULTIPLE))
        self.product = FastLinear(whole, None, requested, known)
        self.weight = nn.Parameter(whole.to(self.product.dtype), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        return self.product(x)[:, : self.num_rows]


class DecodeLayer(nn.Module):
    """A Llama-like decoder layer for steps of few new tokens: one call, or four products with one kernel between each two.

    The time of a step of few rows depends on what runs between its products: operators of torch, modules, and lookups of
    their attributes. This layer looks its parts up once. If the compiled loop cannot run a step as a whole, the wrapped
    layer runs instead.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        attention, feed_forward = layer.attention, layer.feed_forward
        assert isinstance(layer.attention_norm, RMSNorm)
        assert isinstance(layer.ffn_norm, RMSNorm)
        # in tuples, so that they are not registered as submodules
        self._products = attention.qkv, attention.output, feed_forward.up, feed_forward.down
        self._norms = layer.attention_norm.weight, layer.ffn_norm.weight
        self._eps = layer.attention_norm.eps, layer.ffn_norm.eps
        self._scale = attention.head_dim**-0.5
        self._weights: dict[int, LayerWeights | None] = {}

    @staticmethod
    def takes(layer: Layer) -> bool:
        is_llama = isinstance(layer.attention_norm, RMSNorm) and layer.attention.query_norm is None
        return is_llama and not layer.parallel and layer.feed_forward.is_swiglu

    def compile_kernels(self, kv_cache: Tensor, *, has_offsets: bool) -> None:
        """Compile what computes the layer in one call, if it does for any number of rows."""
        for num_rows in ROWS:
            if (weights := self.weights_of_whole(num_rows)) is not None:
                compile_layer(weights, kv_cache, has_offsets=has_offsets)

    def weights_of_whole(self, num_rows: int) -> LayerWeights | None:
        """Return the weights for one call, if all products for this number of rows are integers of one number of bits."""
        num_rows = min(num_rows, MANY_ROWS)
        if num_rows not in self._weights:
            self._weights[num_rows] = self._layer_weights(num_rows)
        return self._weights[num_rows]

    def _layer_weights(self, num_rows: int) -> LayerWeights | None:
        matrices = []
        for linear in self._products:
            product = linear.product(num_rows) if isinstance(linear, FastLinear) else linear
            if not isinstance(product, IntegerProduct) or product.bias is not None:
                return None
            matrices.append(product.weights)
        if len({matrix.bits for matrix in matrices}) > 1:
            return None
        qkv, output, gate_up, down = matrices
        attention_norm, ffn_norm = (norm.detach().float() for norm in self._norms)
        numbers = torch.tensor([*self._eps, self._scale])
        return LayerWeights(qkv, output, gate_up, down, attention_norm, ffn_norm, numbers)

    def forward(self, x: Tensor, context: StepContext, kv: Tensor | None) -> Tensor:
        if context.decoding is None or context.cos is None or context.sin is None or kv is None:
            return self.layer(x, context, kv)
        if (weights := self.weights_of_whole(len(x))) is not None:
            return decoder_layer(x, context.cos, context.sin, kv, context.decoding, weights)
        qkv, output, up, down = self._products
        (attention_norm, ffn_norm), (attention_eps, ffn_eps) = self._norms, self._eps
        heads = qkv(rms_norm(x, attention_norm, attention_eps))
        attended = output(decode_attention(heads, context.cos, context.sin, kv, context.decoding, self._scale))
        h, normed = add_rms_norm(x, attended, ffn_norm, ffn_eps)
        return h + down(swiglu(up(normed)))


def seconds(products: Sequence[Product], x: Tensor) -> list[float]:
    """Return the times of products with matrices of one shape, one after the other as in a step."""
    times = [time.perf_counter()]
    for product in products:
        product(x)
        times.append(time.perf_counter())
    return [end - start for start, end in pairwise(times)]


def typical(times: Sequence[float]) -> float:
    """Return the mean of the fastest quarter: the time of a product while no other program uses the processor."""
    return fmean(sorted(times)[: math.ceil(len(times) / 4)])


def measure(
    groups: Mapping[str, Sequence[FastLinear]],
    sizes: Sequence[int],
    seconds: Callable[[Sequence[Product], Tensor], Sequence[float]] = seconds,
    clock: Callable[[], float] = time.perf_counter,
) -> Choices:
    """Return the fastest format of each group of matrices of one shape, for each number of rows.

    Every round measures all groups and formats once. Only the fastest quarter of a format's products counts, so that other
    programs do not change the result. The matrices of the other groups displace a group's own from the processor's cache,
    as in a step.
    """
    times: dict[tuple[str, int, Format], list[float]] = defaultdict(list)
    began = clock()
    for number in range(ROUNDS):
        if number and clock() - began > MAX_SECONDS:
            break
        for rows in sizes:
            for key, linears in groups.items():
                x = torch.randn(rows, linears[0].shape[1]).to(linears[0].dtype)
                for name in linears[0].products:
                    times[key, rows, name] += seconds([linear.products[name] for linear in linears], x)
    return {
        key: {rows: min(linears[0].products, key=lambda name: typical(times[key, rows, name])) for rows in sizes}
        for key, linears in groups.items()
    }


@torch.inference_mode()
def use_fast_formats(
    model: Flamingo, layers: Sequence[Format], vision: Sequence[Format] = FLOAT32, known: Choices | None = None
) -> Choices:
    """Convert the model's matrices to fast formats, in place, after its gates were folded; return the choices.

    `layers` are the formats for the decoder's layers. With FLOAT32 all numbers stay the same. With others, the decoder and
    the gated layers become bfloat16; gated layers and the output head may also be int8. `vision` are the formats for the
    encoder's linear layers, among FLOAT32 and ROUNDED; its batch norms are folded, and its convolutions packed. The
    resampler does not change. Choices in `known` are not measured again.
    """
    language_model = model.language_model
    gated: Sequence[Format] = FLOAT32 if set(layers) <= set(FLOAT32) else ("int8", "bfloat16")
    fast = _replace(language_model.layers, layers, known) + _replace(model.gated, gated, known)
    for name in ("embed", "head"):
        if isinstance(table := getattr(language_model, name), TokenTable):
            fast_table = FastTable(table, gated, known)
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
        return _choose(fast, ROWS)
    model.vision.pack_convolutions()
    chosen = _choose(fast + _replace(model.resampler, FLOAT32, known), ROWS)
    encoder = _replace(model.vision, vision, known, role="vision ")
    return chosen | _choose(encoder, [ENCODER_ROWS], sample=ENCODER_SAMPLE)


def _replace(
    module: nn.Module, requested: Sequence[Format], known: Choices | None = None, role: str = ""
) -> list[FastLinear]:
    linears = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                linears.append(FastLinear(child.weight, child.bias, requested, known, role))
                setattr(parent, name, linears[-1])
    return linears


def _to_bfloat16(part: nn.Module) -> None:
    """Convert everything except RMSNorms, whose kernel needs float32 weights with activations of any dtype."""
    for module in part.modules():
        if not isinstance(module, RMSNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)


def _choose(linears: list[FastLinear], sizes: Sequence[int], sample: int | None = None) -> Choices:
    """Measure the matrices that have no choice yet, by shape, and return the choices of all."""
    groups: dict[str, list[FastLinear]] = defaultdict(list)
    for linear in linears:
        if linear.choice is None:
            groups[linear.key].append(linear)
    measured = measure({key: group[:sample] for key, group in groups.items()}, sizes)
    for key, group in groups.items():
        for linear in group:
            linear.choose(measured[key])
    return {linear.key: linear.choice for linear in linears if linear.choice is not None}
