"""A decoder layer of the Llama kind as a processor decodes it: four products, and one call between each two of them.

A step of few rows is bound by what lies between its products, a torch operator, a module or an attribute of one at a time.
Here what a layer is made of is looked up once; any other step goes the layer's own way.
"""

from __future__ import annotations

from torch import Tensor, nn

from kernels.decode_attention import decode_attention
from kernels.norm import add_rms_norm, rms_norm
from kernels.swiglu import swiglu
from model.language_model import Layer, StepContext
from model.layers import RMSNorm


class DecodeLayer(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        attention, feed_forward = layer.attention, layer.feed_forward
        assert isinstance(layer.attention_norm, RMSNorm)
        assert isinstance(layer.ffn_norm, RMSNorm)
        # in tuples, which a module does not take for parts of its own
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
