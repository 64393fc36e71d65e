"""How far each layer's tokens are from the last layer's while a solver samples (arXiv:2503.14494, Fig. 2d and 5).

N samples, T tokens, D width, L layers, K network calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pathline import solvers
from pathline.core.draws import BoundDraws, send
from pathline.core.errors import InputError
from pathline.core.flow import BaseFlow
from pathline.metrics.models import Measured, ModelMetric, register
from pathline.solvers import Solver

__all__ = ["Distance", "FeatureDistance", "distance_of", "find_blocks"]

Distance = Literal["euclidean", "normalised", "cosine"]
_UNITS = {
    "euclidean": "Euclidean distance of two tokens",
    "normalised": "Euclidean distance over the last layer's norm",
    "cosine": "1 - cosine of two tokens",
}


@register("feature-distance")
class FeatureDistance(ModelMetric):
    """Distance of every layer's tokens to the last layer's, mean over tokens, by the times of the network calls.

    Row ``layer i`` is the output of the i-th block, ``layer 0`` what goes into the first. Where something stands
    between two blocks, as a refiner does, ``into layer i`` is what it made of the tokens. The last layer's own row is
    zero and left out. Calls at one time, as Heun's two, are averaged. Data give no more than shape, number and labels
    of the samples that are drawn; sample i starts from the noise that ``sample.py`` gives it by the same seed.

    Args:
        solver: of fixed steps: a name, ``{"name": …, **options}`` or an instance; by default the 250 steps of the SDE
            that the paper measured.
        distance: of two tokens h and last: ``euclidean`` ‖h − last‖ (assumed to be the paper's, which states none),
            ``normalised`` ‖h − last‖/‖last‖, or ``cosine`` 1 − cos(h, last), in [0, 2].

    Raises:
        InputError: a solver that chooses its steps, or an unknown distance.
    """

    title = "distance of each layer's tokens to the last layer's"
    ordered = True

    def __init__(
        self, *, solver: str | Mapping[str, Any] | Solver = "euler-maruyama", distance: Distance = "euclidean"
    ) -> None:
        super().__init__()
        if distance not in get_args(Distance):
            raise InputError(f"got distance {distance!r}, expected one of {', '.join(get_args(Distance))}")
        self.solver, self.distance = solvers.build(solver), distance
        if self.solver.adaptive:
            raise InputError(
                f"got the solver {type(self.solver).__name__}, whose steps differ from batch to batch; use one of "
                "fixed steps, as 'euler-maruyama'"
            )
        steps = getattr(self.solver, "steps", "its")
        self.metric = f"feature-distance, {distance}, {type(self.solver).__name__} in {steps} steps"
        self.about = (
            "distance of each layer's tokens to the last layer's, mean over tokens and over the calls at one time"
        )
        self.unit = _UNITS[distance]

    def check(self, flow: BaseFlow) -> None:
        """Refuse networks of fewer than two blocks."""
        find_blocks(flow.backbone)

    def measure(self, flow: BaseFlow, data: Tensor, conditions: Mapping[str, Any], draws: BoundDraws) -> Measured:
        """Sample, and watch every layer."""
        noise = send(draws.normal("initial noise", data.shape[1:]), data.device).to(data)
        watch = _Watch(self.distance, len(data))
        with watch.hooked(flow.backbone):
            solution = self.solver.solve(flow, noise, seed=draws.draws.seed, sample_ids=draws.ids, **conditions)
        if solution.times.shape != (len(watch.calls),):
            raise InputError(
                f"got {len(watch.calls)} network calls at times of shape {tuple(solution.times.shape)}, expected one "
                "time a call; give a flow without guidance and a solver of fixed steps"
            )
        found: dict[float, list[dict[str, Tensor]]] = {}
        for t, call in zip(solution.times.tolist(), watch.calls, strict=True):
            found.setdefault(t, []).append(call)
        columns = [
            {name: torch.stack([call[name] for call in calls]).mean(0) for name in calls[0]} for calls in found.values()
        ]
        times = torch.tensor([*found], dtype=torch.float64)
        return Measured(times, {name: torch.stack([column[name] for column in columns], 1) for name in columns[0]})


class _Watch:
    """Distances of the layers of every network call: name -> (N,)."""

    def __init__(self, distance: Distance, count: int) -> None:
        self.distance, self.count = distance, count
        self.calls: list[dict[str, Tensor]] = []
        self._tokens: dict[str, Tensor] = {}
        self._last: Tensor | None = None

    @contextmanager
    def hooked(self, backbone: nn.Module) -> Iterator[None]:
        """Watch the blocks of a backbone inside of a with statement."""
        blocks = find_blocks(backbone)
        handles = []
        for number, block in enumerate(blocks, start=1):
            before, after = self._hooks(number, final=number == len(blocks))
            handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, number: int, *, final: bool) -> tuple[Any, Any]:
        def before(block: nn.Module, given: tuple[Any, ...]) -> None:
            tokens = _tokens(given, number)
            if number == 1:
                self._tokens = {"layer 0": tokens}
            elif tokens is not self._last:
                self._tokens[f"into layer {number}"] = tokens

        def after(block: nn.Module, given: tuple[Any, ...], said: Any) -> None:
            self._last = _tokens(said, number)
            if final:
                self._finish(self._last)
            else:
                self._tokens[f"layer {number}"] = self._last

        return before, after

    def _finish(self, last: Tensor) -> None:
        if len(last) != self.count:
            raise InputError(
                f"got tokens of {len(last)} samples in a call for {self.count}; give a flow without guidance, which "
                "calls the network on a doubled batch"
            )
        self.calls.append({name: distance_of(tokens, last, self.distance) for name, tokens in self._tokens.items()})
        self._tokens = {}


def find_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network in order: its first module list named ``blocks``.

    Raises:
        InputError: there is none, or one of fewer than two blocks.
    """
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks" and len(module) > 1:
            return list(module)
    raise InputError(
        f"got a {type(backbone).__name__} without two layers to compare, expected a network with a module list named "
        "'blocks', as 'sit' has"
    )


def distance_of(tokens: Tensor, last: Tensor, distance: Distance = "euclidean") -> Tensor:
    """Return the distance of tokens (N, …, D) to the last layer's, mean over all but N and D, (N,)."""
    if tokens.shape != last.shape:
        raise InputError(f"got a layer of shape {tuple(tokens.shape)}, expected the last one's, {tuple(last.shape)}")
    precision = torch.promote_types(last.dtype, torch.float32)
    h, last = tokens.to(precision), last.to(precision)
    if distance == "cosine":
        return (1 - nn.functional.cosine_similarity(h, last, dim=-1)).reshape(len(h), -1).mean(1)
    apart: Tensor = torch.linalg.vector_norm(h - last, dim=-1)
    if distance == "normalised":
        apart = apart / torch.linalg.vector_norm(last, dim=-1)
    return apart.reshape(len(h), -1).mean(1)


def _tokens(value: Any, number: int) -> Tensor:
    first = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(first, Tensor) or first.ndim < 2:
        raise InputError(f"got a {type(first).__name__} as the tokens of block {number}, expected a tensor (N, T, D)")
    return first
