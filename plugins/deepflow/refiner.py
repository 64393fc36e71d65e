"""VeRA: the block between two branches that refines velocity features by a learned acceleration.

Source: arXiv:2503.14494, 3.3. N samples, T tokens, D width, W width of the acceleration MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathline.backbones.layers import Mlp, Modulation, attend, initialize_linear, modulate, norm_without_affine

__all__ = ["AccelerationMlp", "CrossSpaceAttention", "GapModulation", "VelocityRefiner"]


class AccelerationMlp(nn.Sequential):
    """Velocity features to acceleration features: widths D, W, 2W, W, D with SiLU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * hidden),
            nn.SiLU(),
            nn.Linear(2 * hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, width),
        )
        self.apply(initialize_linear)


class GapModulation(nn.Module):
    """Merge velocity and acceleration features, modulated by the time gap: (N, T, 2D) to (N, T, D).

    Args:
        clamp: limit the scale to [−5, 5], as the weights released with alignment were trained.
    """

    def __init__(self, width: int, *, clamp: bool = False) -> None:
        super().__init__()
        self.clamp = clamp
        self.norm = norm_without_affine(2 * width)
        self.modulation = Modulation(2 * width, 2)
        self.mlp = Mlp(2 * width, 2 * width, width)

    def forward(self, features: Tensor, gap: Tensor) -> Tensor:
        """Merge ``features`` (N, T, 2D) given the gap embedding (N, 2D)."""
        shift, scale = self.modulation(gap)
        if self.clamp:
            scale = scale.clamp(-5.0, 5.0)
        merged: Tensor = self.mlp(modulate(self.norm(features), shift, scale))
        return merged


class CrossSpaceAttention(nn.Module):
    """Let the image tokens attend to refined features; one affine norm serves both sides.

    The residual is that of the normed query, and nothing forms an attention map.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.apply(initialize_linear)

    def forward(self, space: Tensor, features: Tensor) -> Tensor:
        """Attend from ``space`` (N, T, D) to ``features`` (N, T, D)."""
        query, refined = self.norm(space), self.norm(features)
        width = query.shape[-1]
        weight, bias = self.query_key_value.weight, self.query_key_value.bias
        key, value = functional.linear(refined, weight[width:], bias[width:]).chunk(2, dim=-1)
        attended = attend(functional.linear(query, weight[:width], bias[:width]), key, value, self.num_heads)
        summed: Tensor = query + self.output(attended)
        return summed


class VelocityRefiner(nn.Module):
    """One VeRA block: acceleration features from velocity features, then refined features for the next branch.

    Args:
        width: D.
        num_heads: heads of the cross-space attention, those of the trunk.
        acceleration_width: W.
        clamp_gap: limit the gap's scale to [−5, 5].
    """

    def __init__(self, width: int, num_heads: int, acceleration_width: int, *, clamp_gap: bool = False) -> None:
        super().__init__()
        self.acceleration = AccelerationMlp(width, acceleration_width)
        self.gap_modulation = GapModulation(width, clamp=clamp_gap)
        self.cross_space = CrossSpaceAttention(width, num_heads)

    def forward(self, velocity: Tensor, space: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Return acceleration features and refined tokens, both (N, T, D).

        Args:
            velocity: tokens of the branch that ends here, (N, T, D).
            space: the embedded image, (N, T, D).
            gap: embedding of the time gap to the next branch, (N, 2D).
        """
        acceleration: Tensor = self.acceleration(velocity)
        merged = self.gap_modulation(torch.cat((velocity, acceleration), dim=-1), gap)
        return acceleration, self.cross_space(space, merged)
