"""Guidance by a label: the conditional prediction c against n, the prediction with the null label.

Both come from one network call on a doubled batch. N samples; S the shape of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow
from pathline.interpolants.base import Kind, broadcast
from pathline.solvers.guidance.base import Interval, Moment, PairGuidance, Scale, dot, finite, length, registry
from pathline.solvers.guidance.flows import LabelGuidedFlow

__all__ = ["AdaptiveProjected", "CFGZero", "ClassifierFree", "LabelGuidance"]


class LabelGuidance(PairGuidance):
    """Guidance towards a label; a subclass gives its formula.

    Args:
        scale: see ``PairGuidance``.
        interval: see ``PairGuidance``.
        rescale: see ``PairGuidance``.
        channels: see ``PairGuidance``.
        quantity: see ``PairGuidance``.
        null: the label that stands for none; None takes the backbone's.
    """

    def __init__(
        self,
        scale: Scale,
        *,
        interval: Interval = (0.0, 1.0),
        rescale: float = 0.0,
        channels: int | None = None,
        quantity: Kind | None = None,
        null: int | None = None,
    ) -> None:
        super().__init__(scale, interval=interval, rescale=rescale, channels=channels, quantity=quantity)
        self.null = null

    def __call__(self, flow: BaseFlow) -> LabelGuidedFlow:
        """Wrap a flow; raises InputError if neither the backbone nor ``null`` names a null label."""
        null = getattr(flow.backbone, "null_label", None) if self.null is None else self.null
        if null is None:
            raise InputError(
                "got guidance for a backbone without a null label; pass null=…, or train with label dropout and one"
            )
        return LabelGuidedFlow(flow, self, null)


@registry.register("classifier-free", aliases=("cfg",))
class ClassifierFree(LabelGuidance):
    """n + w·(c − n), classifier-free guidance (arXiv:2207.12598).

    Args:
        scale: w; 1 is off, above 1 sharpens; see ``PairGuidance``.
        interval: see ``PairGuidance``.
        rescale: see ``PairGuidance``.
        channels: see ``PairGuidance``.
        quantity: see ``PairGuidance``; without ``rescale`` the result is the same in any.
        null: see ``LabelGuidance``.
    """

    def __init__(
        self,
        scale: Scale = 1.5,
        *,
        interval: Interval = (0.0, 1.0),
        rescale: float = 0.0,
        channels: int | None = None,
        quantity: Kind | None = None,
        null: int | None = None,
    ) -> None:
        super().__init__(scale, interval=interval, rescale=rescale, channels=channels, quantity=quantity, null=null)

    def formula(self, strong: Tensor, weak: Tensor, at: Moment) -> Tensor:
        """See ``PairGuidance``."""
        return torch.lerp(weak, strong, at.scale)


@registry.register("cfg-zero")
class CFGZero(LabelGuidance):
    """s·n + w·(c − s·n), s = ⟨c, n⟩/(‖n‖² + 1e-8): CFG-Zero*, which fits n to c first (arXiv:2503.18886).

    Args:
        scale: see ``PairGuidance``.
        interval: see ``PairGuidance``.
        rescale: see ``PairGuidance``.
        channels: see ``PairGuidance``; then s is of these channels.
        quantity: see ``PairGuidance``; the paper's is the velocity.
        null: see ``LabelGuidance``.
        zero_above: velocity 0 while t > this, where guided; None is off. The paper's zero start of K steps is
            ``solver.times[K]`` of Euler's method; one that looks ahead moves by what it sees at a step's end.

    Raises:
        InputError: a ``zero_above`` outside [0, 1], or beside another quantity than the velocity.
    """

    def __init__(
        self,
        scale: Scale = 1.5,
        *,
        interval: Interval = (0.0, 1.0),
        rescale: float = 0.0,
        channels: int | None = None,
        quantity: Kind | None = "velocity",
        null: int | None = None,
        zero_above: float | None = None,
    ) -> None:
        super().__init__(scale, interval=interval, rescale=rescale, channels=channels, quantity=quantity, null=null)
        if zero_above is not None and not 0 <= finite("zero_above", zero_above) <= 1:
            raise InputError(f"got zero_above {zero_above}, expected a time in [0, 1], or None for no zero start")
        if zero_above is not None and quantity != "velocity":
            raise InputError(f"got zero_above with the quantity {quantity!r}; velocities are zeroed: use 'velocity'")
        self.zero_above = zero_above

    def formula(self, strong: Tensor, weak: Tensor, at: Moment) -> Tensor:
        """See ``PairGuidance``."""
        if self.zero_above is not None and not at.t.ndim and float(at.t) > self.zero_above:
            return torch.zeros_like(strong)
        fit = (dot(strong, weak) / (length(weak).square() + 1e-8)).to(weak.dtype)
        guided = torch.lerp(fit * weak, strong, at.scale)
        if self.zero_above is None or not at.t.ndim:
            return guided
        return guided.masked_fill(broadcast(at.t > self.zero_above, guided), 0.0)


@registry.register("apg")
class AdaptiveProjected(LabelGuidance):
    """c + (w − 1)·(d⊥ + η·d∥): adaptive projected guidance (arXiv:2410.02416).

    d = c − n, plus ``momentum`` times the accumulated d of the evaluation before, shortened to at most ``norm``, is
    split into d∥, parallel to c, and d⊥. Each trajectory remembers its own; outside of a solve nothing is remembered.

    Args:
        scale: see ``PairGuidance``.
        interval: see ``PairGuidance``; evaluations outside of it are not remembered.
        rescale: see ``PairGuidance``.
        channels: see ``PairGuidance``; then norms and directions are of these channels.
        quantity: see ``PairGuidance``; the paper's is the data.
        null: see ``LabelGuidance``.
        eta: η, the share of d∥ that stays; the paper's 0. 1, without momentum and norm, is classifier-free guidance.
        momentum: β of the accumulation, over network evaluations, not steps; 0, the default, is off. The paper's are
            negative, as −0.5, and differ from model to model. Solvers that reject steps refuse it.
        norm: r, the longest d of a sample over all its values; None, the default, is off. The paper's differ from model
            to model, with the number of values of a sample and their scale.

    Raises:
        InputError: an eta or a momentum that is not finite, or a norm that is not above 0.
    """

    def __init__(
        self,
        scale: Scale = 1.5,
        *,
        interval: Interval = (0.0, 1.0),
        rescale: float = 0.0,
        channels: int | None = None,
        quantity: Kind | None = "data",
        null: int | None = None,
        eta: float = 0.0,
        momentum: float = 0.0,
        norm: float | None = None,
    ) -> None:
        super().__init__(scale, interval=interval, rescale=rescale, channels=channels, quantity=quantity, null=null)
        self.eta, self.momentum = finite("eta", eta), finite("momentum", momentum)
        if norm is not None and finite("norm", norm) <= 0:
            raise InputError(f"got norm {norm}, expected a length above 0, or None for no bound")
        self.norm = norm

    @property
    def remembers(self) -> bool:
        """See ``PairGuidance``."""
        return self.momentum != 0

    def formula(self, strong: Tensor, weak: Tensor, at: Moment) -> Tensor:
        """See ``PairGuidance``: c·(1 − (w − 1)(1 − η)·p) + (w − 1)·d, p·c = d∥."""
        difference = strong - weak
        if self.momentum:
            difference = at.accumulate(difference, self.momentum)
        if self.norm is not None:
            difference = difference * (self.norm / length(difference).clamp(min=self.norm)).to(difference.dtype)
        more = at.scale - 1
        if self.eta == 1:
            return strong + more * difference
        square = length(strong).square()
        share = torch.where(square > 0, dot(difference, strong) / square.clamp(min=torch.finfo(square.dtype).tiny), 0.0)
        return strong * (1 - more * (1 - self.eta) * share.to(strong.dtype)) + more * difference
