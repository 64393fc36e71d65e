"""Networks on other programs' clocks, wrapped so that they run on ours (t = 0 data, t = 1 noise)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from pathline.backbones.base import Backbone, registry
from pathline.core.errors import InputError

__all__ = ["BackboneSpec", "Clocked", "DiTClock", "ReversedClock"]

BackboneSpec = Annotated[nn.Module | str | Mapping[str, Any], registry]


class Clocked(Backbone):
    """A network within one that translates its clock; a subclass gives ``forward``.

    Args:
        backbone: the network, or a backbone by name.
    """

    def __init__(self, backbone: BackboneSpec) -> None:
        super().__init__()
        self.backbone = registry.build(backbone)
        self.num_classes = getattr(self.backbone, "num_classes", 0)
        self.null_label = getattr(self.backbone, "null_label", None)
        self.input_shape = getattr(self.backbone, "input_shape", None)
        self.depth = getattr(self.backbone, "depth", None)


@registry.register("reversed-clock")
class ReversedClock(Clocked):
    """−net(x, 1 − t): a velocity network whose clock runs from noise (0) to data (1), as SiT's.

    Args:
        backbone: see ``Clocked``.
    """

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """Predict the velocity on our clock."""
        predicted: Tensor = self.backbone(x, 1 - t, **conditions)
        return -predicted


@registry.register("dit-clock")
class DiTClock(Clocked):
    """net(x, k): a network that counts diffusion steps, as DiT's, asked at the step that is as noisy as ``vp`` at t.

    Step k of DiT has ᾱ = Π_{i ≤ k}(1 − β_i), β linear from 1e-4 to 0.02 over 1000 steps; the path has α² = exp(−B(t)).
    k solves ᾱ_k = α², and lies between steps where they do not agree. With k = 1000t − 1 in its place, α and σ would be
    wrong by up to 0.0010 and 0.0013: ln ᾱ ends at −10.12, and the path at −10.05. Below the first step, t < 0.0009, it
    is the first.

    Args:
        backbone: see ``Clocked``.
        steps: number of diffusion steps, 2 or more.
        betas: β of the first and the last step, in (0, 1).
        beta_min: of the path ``vp``.
        beta_max: of the path ``vp``.

    Raises:
        InputError: steps or betas out of range.
    """

    totals: Tensor

    def __init__(
        self,
        backbone: BackboneSpec,
        *,
        steps: int = 1000,
        betas: tuple[float, float] = (1e-4, 0.02),
        beta_min: float = 0.1,
        beta_max: float = 20.0,
    ) -> None:
        super().__init__(backbone)
        if steps < 2 or not 0 < min(betas) <= max(betas) < 1 or not 0 < beta_min <= beta_max:
            raise InputError(
                f"got steps {steps}, betas {tuple(betas)}, beta_min {beta_min} and beta_max {beta_max}; expected two "
                "steps or more, betas in (0, 1), and 0 < beta_min <= beta_max"
            )
        self.beta_min, self.beta_max = beta_min, beta_max
        each = torch.linspace(*betas, steps, dtype=torch.float64)
        self.register_buffer("totals", -torch.log1p(-each).cumsum(0), persistent=False)  # −ln ᾱ_k

    def step_at(self, t: Tensor) -> Tensor:
        """Return the step k, a fraction between steps, that is as noisy as the path at t; float32 or wider."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        wanted = t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))  # B(t)
        totals = self.totals.to(t.dtype)
        after = torch.searchsorted(totals, wanted.contiguous()).clamp(1, len(totals) - 1)
        low, high = totals[after - 1], totals[after]
        return (after - 1 + (wanted - low) / (high - low)).clamp(0, len(totals) - 1)

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """Predict what the network predicts, at our time."""
        predicted: Tensor = self.backbone(x, self.step_at(t), **conditions)
        return predicted
