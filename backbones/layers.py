"""Layers of the transformers. Attention runs through ``scaled_dot_product_attention`` in one place: ``attend``.

N samples, T tokens, M key tokens, D width, h heads, p patch side, C channels, H × W image, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pathline.core.errors import InputError

__all__ = [
    "Attention",
    "Block",
    "Head",
    "LabelEmbedding",
    "Mlp",
    "Modulation",
    "PatchEmbedding",
    "Projector",
    "ScalarEmbedding",
    "attend",
    "embed_gap",
    "initialize_linear",
    "math_attention",
    "modulate",
    "norm_without_affine",
    "position_table",
    "scalar_features",
    "unpatchify",
]


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention of (N, T, D) queries on (N, M, D) keys and values, scale 1/√(D/h); no map is formed."""
    query, key, value = (rearrange(x, "n t (h d) -> n h t d", h=num_heads) for x in (query, key, value))
    return rearrange(functional.scaled_dot_product_attention(query, key, value), "n h t d -> n t (h d)")


@contextmanager
def math_attention() -> Iterator[None]:
    """Run attention through plain matrix products, as forward-mode differentiation needs (fused kernels have none)."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x·(1 + scale) + shift for tokens (N, T, D) and one (N, D) of each a sample."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def norm_without_affine(width: int) -> nn.LayerNorm:
    """Layer norm as adaptive modulation needs it: no affine parameters, ε = 1e-6."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def initialize_linear(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias for a linear layer; leave anything else alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def scalar_features(value: Tensor, count: int = 256, *, scale: float = 1.0) -> Tensor:
    """Return cos then sin features of (N,) scalars times ``scale``, (N, count), in float32 or wider.

    Frequencies are 10000^(−i/(count/2)), i = 0 … count/2 − 1, as in DiT (arXiv:2212.09748).
    """
    value = value.to(torch.promote_types(value.dtype, torch.float32)) * scale
    half = count // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=value.dtype, device=value.device))
    angles = value[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def position_table(width: int, height_tokens: int, width_tokens: int) -> Tensor:
    """Return the fixed 2-D sine–cosine table, (1, T, D), float32, tokens row by row.

    The first half of D tells the column, the second the row; in each half sines come before cosines.

    Raises:
        InputError: D is not divisible by 4.
    """
    if width % 4:
        raise InputError(f"got hidden_size {width}, expected a multiple of 4 for the position table")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in (height_tokens, width_tokens))
    row_table, column_table = (torch.cat((a.sin(), a.cos()), dim=1) for a in (rows, columns))
    table = torch.cat(
        (
            column_table.repeat(height_tokens, 1),
            row_table.repeat_interleave(width_tokens, dim=0),
        ),
        dim=1,
    )
    return table.float().unsqueeze(0)


def unpatchify(tokens: Tensor, height_tokens: int, patch: int) -> Tensor:
    """Turn (N, T, p·p·C) into (N, C, H, W); inside a token the order is row, column, channel."""
    return rearrange(tokens, "n (h w) (p q c) -> n c (h p) (w q)", h=height_tokens, p=patch, q=patch)


class PatchEmbedding(nn.Module):
    """Cut (N, C, H, W) into p × p patches and project each, (N, T, D)."""

    def __init__(self, in_channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.projection.weight.view(width, -1))
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]  # the convolution is built with a bias

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches."""
        tokens: Tensor = rearrange(self.projection(x), "n d h w -> n (h w) d")
        return tokens


class ScalarEmbedding(nn.Module):
    """Embed (N,) scalars: 256 features, Linear, SiLU, Linear, (N, D).

    Args:
        width: D.
        scale: what the scalars are multiplied by before their features are made; 1 leaves them raw.
    """

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.hidden = nn.Linear(256, width)
        self.output = nn.Linear(width, width)
        for layer in (self.hidden, self.output):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, value: Tensor) -> Tensor:
        """Embed; features are made in float32 and cast to the layers' precision."""
        features = scalar_features(value, scale=self.scale).to(self.hidden.weight.dtype)
        embedded: Tensor = self.output(functional.silu(self.hidden(features)))
        return embedded


class LabelEmbedding(nn.Embedding):
    """A table of num_classes + 1 rows; the last one stands for no label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes + 1, width)
        nn.init.normal_(self.weight, std=0.02)


def embed_gap(embedding: ScalarEmbedding | None, gap: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the embedding of a time gap (N,), of zeros where none is given; None for a network that takes none.

    Raises:
        InputError: a gap for a network that takes none, or of another shape than ``like``, (N,).
    """
    if embedding is None:
        if gap is not None:
            raise InputError("got a gap, which this backbone does not take; build it with takes_gap=True")
        return None
    if gap is not None and gap.shape != like.shape:
        raise InputError(f"got a gap of shape {tuple(gap.shape)}, expected {tuple(like.shape)}: one a sample")
    embedded: Tensor = embedding(torch.zeros_like(like) if gap is None else gap)
    return embedded


class Modulation(nn.Module):
    """SiLU and a zero-initialised linear layer: (N, D) to ``parts`` tensors (N, width)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return the parts in order."""
        parts: tuple[Tensor, ...] = self.linear(functional.silu(condition)).chunk(self.parts, dim=1)
        return parts


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int, output: int | None = None) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, output or width)
        self.apply(initialize_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        mapped: Tensor = self.output(functional.gelu(self.hidden(x), approximate="tanh"))
        return mapped


class Projector(nn.Sequential):
    """Tokens to an encoder's feature space: three linear layers with SiLU between, as in REPA (arXiv:2410.06940)."""

    def __init__(self, width: int, hidden: int, output: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, output)
        )
        self.apply(initialize_linear)


class Attention(nn.Module):
    """Self-attention over (N, T, D); one projection gives queries, keys and values in thirds.

    Args:
        norm: layer-normalise each head's queries and keys (arXiv:2302.05442); off in all released weights.
    """

    def __init__(self, width: int, num_heads: int, *, norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        head_width = width // num_heads
        self.query_norm = nn.LayerNorm(head_width) if norm else None
        self.key_norm = nn.LayerNorm(head_width) if norm else None
        self.apply(initialize_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        query, key, value = self.query_key_value(x).chunk(3, dim=-1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self._per_head(query, self.query_norm), self._per_head(key, self.key_norm)
        attended: Tensor = self.output(attend(query, key, value, self.num_heads))
        return attended

    def _per_head(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        heads = rearrange(x, "n t (h d) -> n t h d", h=self.num_heads)
        normed: Tensor = rearrange(norm(heads), "n t h d -> n t (h d)")
        return normed


class Block(nn.Module):
    """A transformer block modulated by the condition, zero at first (adaLN-zero, arXiv:2212.09748)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0, *, query_key_norm: bool = False) -> None:
        super().__init__()
        if width * mlp_ratio < 1:
            raise InputError(f"got mlp_ratio {mlp_ratio} of width {width}, expected an MLP at least 1 wide")
        self.modulation = Modulation(width, 6)
        self.attention_norm = norm_without_affine(width)
        self.attention = Attention(width, num_heads, norm=query_key_norm)
        self.mlp_norm = norm_without_affine(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, tokens: Tensor, context: Tensor | None, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (N, T, D) tokens; the context passes unchanged, as there is one stream."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)
        attended = self.attention(modulate(self.attention_norm(tokens), shift_a, scale_a))
        tokens = torch.addcmul(tokens, gate_a.unsqueeze(1), attended)
        mapped = self.mlp(modulate(self.mlp_norm(tokens), shift_m, scale_m))
        return torch.addcmul(tokens, gate_m.unsqueeze(1), mapped), context


class Head(nn.Module):
    """Modulated norm and a zero-initialised linear layer: (N, T, D) to (N, T, output)."""

    def __init__(self, width: int, output: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.norm = norm_without_affine(width)
        self.linear = nn.Linear(width, output)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Predict p·p·C values a token."""
        shift, scale = self.modulation(condition)
        predicted: Tensor = self.linear(modulate(self.norm(tokens), shift, scale))
        return predicted
