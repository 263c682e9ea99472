"""The resampler's attention: latents attend to [features; latents] (paper, section 3.1), without building that row.

Any number of features: an image's patches or all frames of a video.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resampler_attention_reference(
    query: Tensor, feature_key: Tensor, feature_value: Tensor, latent_key: Tensor, latent_value: Tensor, *, scale: float
) -> Tensor:
    key = torch.cat([feature_key, latent_key], 1).float()  # [M, N + R, H, K]
    value = torch.cat([feature_value, latent_value], 1).float()
    weights = (torch.einsum("mrhk,mnhk->mhrn", query.float(), key) * scale).softmax(-1)
    return torch.einsum("mhrn,mnhk->mrhk", weights, value).to(query.dtype)


def resampler_attention(
    query: Tensor, feature_key: Tensor, feature_value: Tensor, latent_key: Tensor, latent_value: Tensor, *, scale: float
) -> Tensor:
    """query, latent_key, latent_value [M, R, H, K]; feature_key, feature_value [M, N, H, K] -> [M, R, H, K]"""
    key = torch.cat([feature_key, latent_key], 1)
    value = torch.cat([feature_value, latent_value], 1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
