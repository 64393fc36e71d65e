"""Autoguidance: a model guided by a weaker version of itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pathline.core.errors import InputError, InputTypeError
from pathline.core.flow import BaseFlow, Flow
from pathline.interpolants.base import Kind
from pathline.solvers.guidance.base import Interval, Moment, PairGuidance, Scale, registry
from pathline.solvers.guidance.flows import GuidedFlow, WeakGuidedFlow

__all__ = ["Autoguidance"]


@registry.register("autoguidance")
class Autoguidance(PairGuidance):
    """r + w·(m − r), r the prediction of a weaker model with the same conditions (arXiv:2406.02507).

    Two network calls an evaluation, both counted. Where the two predict different quantities and none is declared, the
    formula acts on the velocity; without ``rescale`` the result is the same in any.

    Args:
        weak: a smaller or less trained backbone, on the same path and of the same kind of prediction; or a flow on the
            same path, guided or not. In a configuration of ``sample.py`` the folder of its run.
        scale: see ``PairGuidance``.
        interval: see ``PairGuidance``.
        rescale: see ``PairGuidance``.
        channels: see ``PairGuidance``.
        quantity: see ``PairGuidance``.

    Raises:
        InputTypeError: a ``weak`` that is neither a backbone nor a flow.
    """

    def __init__(
        self,
        weak: nn.Module | BaseFlow | str,
        scale: Scale = 2.0,
        *,
        interval: Interval = (0.0, 1.0),
        rescale: float = 0.0,
        channels: int | None = None,
        quantity: Kind | None = None,
    ) -> None:
        super().__init__(scale, interval=interval, rescale=rescale, channels=channels, quantity=quantity)
        if not isinstance(weak, nn.Module | BaseFlow):
            raise InputTypeError(
                f"got {weak!r} for a weak model, expected a backbone or a flow; load it first, as sample.py does with "
                "the folder of a run"
            )
        self.weak: nn.Module | BaseFlow = weak

    def __call__(self, flow: BaseFlow) -> WeakGuidedFlow:
        """Wrap a flow.

        Raises:
            InputError: a weak model on another path, or for samples of another shape.
        """
        return WeakGuidedFlow(flow, self, self.weak if isinstance(self.weak, BaseFlow) else _like(flow, self.weak))

    def formula(self, strong: Tensor, weak: Tensor, at: Moment) -> Tensor:
        """See ``PairGuidance``."""
        return torch.lerp(weak, strong, at.scale)


def _like(flow: BaseFlow, backbone: nn.Module) -> Flow:
    """Put a backbone on the path, and to the kind of prediction, of the network in a flow."""
    while isinstance(flow, GuidedFlow):
        flow = flow.flow
    if not isinstance(flow, Flow):
        raise InputError(
            f"got a weak backbone beside a {type(flow).__name__}, expected a weak flow; make it as the strong one"
        )
    return Flow(backbone, flow.interpolant, flow.predicts)
