"""Laws of time: how training times are drawn. t = 0 is data, t = 1 is noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor

from pathline.core.draws import BoundDraws
from pathline.core.errors import InputError
from pathline.core.registry import Registry

__all__ = ["LogitNormal", "TimeLaw", "TimeLawSpec", "Uniform", "build", "names", "register", "registry"]


class TimeLaw(ABC):
    """A distribution over [0, 1]."""

    @abstractmethod
    def sample(self, draws: BoundDraws) -> Tensor:
        """Return one time a sample, (N,) float32 on the host, from the stream ``time``."""


registry: Registry[TimeLaw] = Registry("law of time", "objectives.times", TimeLaw)
register, build, names = registry.register, registry.build, registry.names

TimeLawSpec = Annotated[TimeLaw | str | Mapping[str, Any], registry]


@registry.register("uniform")
class Uniform(TimeLaw):
    """Uniform on [0, 1)."""

    def sample(self, draws: BoundDraws) -> Tensor:
        """Return (N,) uniform times."""
        return draws.uniform("time")


@registry.register("logit-normal")
class LogitNormal(TimeLaw):
    """t = sigmoid(mean + std·n), n standard normal (arXiv:2403.03206, Eq. 19).

    Args:
        mean: shifts the mass towards noise (positive) or data (negative).
        std: spread, above 0; the paper's best is mean 0, std 1.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise InputError(f"got mean {mean} and std {std}, expected finite numbers, std above 0")
        self.mean, self.std = mean, std

    def sample(self, draws: BoundDraws) -> Tensor:
        """Return (N,) logit-normal times."""
        return (self.mean + self.std * draws.normal("time")).sigmoid()
