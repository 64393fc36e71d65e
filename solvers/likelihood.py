"""How likely a flow holds data to be: the change of variables along its ODE, as a flow that any ODE solver can run.

log p_0(x_0) = log p_1(x_1) + ∫₀¹ div v(x_t, t) dt with dx/dt = v (arXiv:1806.07366, Theorem 1), p_1 standard normal.

Inversion, from data to noise alone, needs none of this: ``solver.reversed()`` does it.

N samples; S the shape of one sample, D its number of values; k probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor, distributed
from torch.nn.attention import SDPBackend, sdpa_kernel

from pathline.core.draws import Draws
from pathline.core.errors import InputError, InputTypeError, SolverError, UnknownNameError, suggest
from pathline.core.flow import BaseFlow
from pathline.interpolants.bridge import TwoEnded
from pathline.solvers.base import Solver, registry
from pathline.solvers.divergence import DivergenceFlow, Probe, draw_probes

__all__ = ["Dequantization", "LogLikelihood", "SolverSpec", "log_likelihood", "sharded"]

SolverSpec = Solver | str | Mapping[str, Any]
LogDensity = Callable[[Tensor], Tensor]

_LARGEST = 4096  # values a sample for which the exact divergence is allowed
_OFF_LEVEL = 0.01  # of a bin's width; float32 rounding at 65,536 levels is 0.004


@dataclass(frozen=True)
class Dequantization:
    """Data of equally spaced levels, each of which stands for a bin of uniform density about it.

    Attributes:
        levels: number of levels, the interval's two ends among them.
        interval: the lowest and the highest level.
    """

    levels: int
    interval: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise InputError(f"got levels {self.levels!r}, expected a whole number of 2 or more, or None")
        if not -math.inf < low < high < math.inf:
            raise InputError(f"got interval {self.interval}, expected (low, high), finite, low below high")

    @property
    def width(self) -> float:
        """Width of a bin: the distance between two levels."""
        return (self.interval[1] - self.interval[0]) / (self.levels - 1)

    def apply(self, data: Tensor, seed: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Return data plus noise, uniform over each value's bin and keyed by (seed, sample id).

        Raises:
            InputError: a value that is none of the levels.
        """
        index = (data.detach().double() - self.interval[0]) / self.width
        wrong = ~((index - index.round()).abs() < _OFF_LEVEL) | (index.round() < 0) | (index.round() >= self.levels)
        if bool(wrong.any()):
            low, high = self.interval
            raise InputError(
                f"got the value {float(data[wrong][0]):g}, expected one of {self.levels} levels from {low:g} to "
                f"{high:g} at a distance of {self.width:g}, both ends included; give levels and interval of the data"
            )
        noise = Draws(seed).uniform("dequantization", ids, data.shape[1:])
        return data + (noise.to(data) - 0.5) * self.width


@dataclass(frozen=True)
class LogLikelihood:
    """What ``log_likelihood`` returns.

    Attributes:
        log_density: log p_0 of each sample, of its noised value if it was dequantised, in nats, (N,).
        bits_per_dimension: −log₂ p / D, (N,): of the density, or of the discrete values if there are levels.
        standard_error: of log_density over the probes, in nats, (N,); 0 if exact, None with one probe, which has none.
        latent: x_1, the noise that the solver takes to the data, (N, *S).
        nfe: network calls; each is followed by one vector–Jacobian product a probe, or D of them if exact.
        seed: of probes and dequantisation.
        dequantization: how discrete values were taken as continuous ones; None if they were not.
    """

    log_density: Tensor
    bits_per_dimension: Tensor
    standard_error: Tensor | None
    latent: Tensor
    nfe: int
    seed: int
    dequantization: Dequantization | None


def log_likelihood(
    flow: BaseFlow,
    data: Tensor,
    *,
    solver: SolverSpec = "dopri5",
    probes: int = 1,
    probe: Probe = "rademacher",
    exact: bool = False,
    levels: int | None = None,
    interval: tuple[float, float] = (-1.0, 1.0),
    prior: LogDensity | None = None,
    seed: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    gradients: bool = False,
    progress: bool = False,
    **conditions: Any,
) -> LogLikelihood:
    """Return the log-likelihood of data.

    With ``levels`` L and their distance δ, P(data) = ∫ p(data + δ·u) du·δᴰ over the bins, u uniform in [−½, ½]ᴰ, is
    estimated by one u a sample: bits a dimension = −(log p(data + δ·u) + D·log δ)/(D·log 2), in expectation an upper
    bound of −log₂ P/D (arXiv:1511.01844). Without levels, bits a dimension depend on the unit of the data.

    The network has to treat each sample alone. On the path ``vp`` the velocity is infinite at t = 0: give
    ``solver={"name": "dopri5", "start": 1e-3}``; the result is then log p_start of the data taken as a state at that
    time. That path ends a little before pure noise, with p_1 taken as standard normal all the same: the true one has
    mean α(1)·E[data], α(1) = 0.0066, and hardly another variance. An adaptive solver controls the error of state and
    divergence together.

    Args:
        flow: any, guided or not; but no guidance with momentum, whose velocity is no function of (x, t).
        data: (N, *S), floating point; half precisions are taken to float32. Left as it is.
        solver: an ODE solver by name or mapping, from ``start`` 0 to ``end`` 1 unless it says otherwise, or an
            instance. One that runs from noise to data is reversed: the same steps from data to noise.
        probes: k, one or more, each drawn once a solve and averaged.
        probe: ``rademacher``, ±1, whose variance is the smaller; or ``gaussian``.
        exact: compute the divergence by D vector–Jacobian products instead; D up to 4096.
        levels: number of equally spaced values that the data may take, both ends of ``interval`` included: 256 for
            images x/127.5 − 1, 17 for ``digits``. None: the data are continuous.
        interval: lowest and highest level.
        prior: x_1 (N, *S) -> log-density in nats (N,), where it is not standard normal: on a path between two data
            sets, or for a solver that ends before t = 1.
        seed: of probes and dequantisation; None takes one from torch's generator.
        sample_ids: N ids that key them, so that a sample's value is the same in any batch; None means 0 … N − 1.
        gradients: keep the graph, so that the result can be differentiated by data and parameters.
        progress: show a progress bar.
        conditions: named tensors for the backbone, as ``label`` of shape (N,).

    Raises:
        InputError, InputTypeError: data, a solver, a path or an option that does not fit.
        UnknownNameError: an unknown probe.
        OpenEndError, SolverError: see ``Solver.solve``.
    """
    ids = _check(flow, data, sample_ids)
    dequantization = None if levels is None else Dequantization(levels, interval)
    _check_probes(probes, probe, exact, math.prod(data.shape[1:]))
    built = _build(solver, flow, prior)
    seed = Draws.from_torch().seed if seed is None else Draws(seed).seed
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), _kernels(gradients):
        x = _usable(data).to(torch.promote_types(data.dtype, torch.float32))
        x = x if dequantization is None else dequantization.apply(x, seed, ids)
        drawn = None if exact else draw_probes(x, probes, probe, seed, ids)
        augmented = DivergenceFlow(flow, tuple(x.shape[1:]), drawn, gradients)
        given = {name: _usable(value) for name, value in conditions.items()}
        solution = built.solve(
            augmented, augmented.begun(x), seed=seed, sample_ids=ids, progress=progress, gradients=gradients, **given
        )
        latent, integrals = augmented.split(solution.x)
        log_density = _at_the_end(prior, latent) + integrals.mean(1)
        error = integrals.std(1) / math.sqrt(probes) if probes > 1 else None
    return LogLikelihood(
        log_density,
        _bits(log_density, augmented.size, dequantization),
        torch.zeros_like(log_density) if exact else error,
        latent,
        solution.nfe,
        seed,
        dequantization,
    )


def sharded(
    flow: BaseFlow,
    data: Tensor,
    *,
    seed: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    group: distributed.ProcessGroup | None = None,
    **options: Any,
) -> LogLikelihood:
    """Return ``log_likelihood`` of all data in each process, computed by all: each takes a part of the samples.

    Every process of the group calls it with the same arguments, as under ``torchrun`` or in a launched ``Fabric``;
    without a process group it is ``log_likelihood``. A sample's probes are keyed by its id, so that the split changes
    nothing but rounding, and with a solver that shares its steps among a batch, as torchdiffeq's adaptive ones, what
    its tolerance allows. NFE is that of the process that needed most.

    Args:
        flow: see ``log_likelihood``; what has one row a sample is to be given here, not bound to the flow.
        data: all N samples, (N, *S), on this process's device.
        seed: see ``log_likelihood``; None takes the first process's.
        sample_ids: see ``log_likelihood``; all N.
        group: of processes; None is the default one.
        options: as for ``log_likelihood``; a tensor of N rows is cut like the data, anything else handed on.

    Raises:
        InputError: ``gradients=True``: they do not pass between processes.
        SolverError: another process failed.
    """
    if options.get("gradients"):
        raise InputError("got gradients=True for a sharded likelihood; use log_likelihood in each process")
    if not (distributed.is_available() and distributed.is_initialized()):
        return log_likelihood(flow, data, seed=seed, sample_ids=sample_ids, **options)
    ids, count = _check(flow, data, sample_ids), len(data)
    seed = _agreed(seed, data.device, group)
    rank, world = distributed.get_rank(group), distributed.get_world_size(group)
    mine = torch.arange(count).tensor_split(world)[rank].tolist()
    rows = slice(mine[0], mine[-1] + 1) if mine else slice(0, 1)  # a process without samples repeats the first

    def cut(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value

    given = {name: cut(value) for name, value in options.items()}
    part, failure = None, None
    try:
        part = log_likelihood(flow, data[rows], seed=seed, sample_ids=ids[rows], **given)
    except Exception as error:  # whatever it is, the others wait
        failure = error
    _raise_together(failure, data.device, group)
    assert part is not None

    def whole(value: Tensor) -> Tensor:
        everything = value.new_zeros(count, *value.shape[1:])
        everything[rows] = value if mine else 0
        distributed.all_reduce(everything, group=group)
        return everything

    nfe = torch.tensor(part.nfe, device=data.device)
    distributed.all_reduce(nfe, distributed.ReduceOp.MAX, group=group)
    parts: dict[str, Any] = {field.name: getattr(part, field.name) for field in fields(part)}
    tensors = {name: whole(value) for name, value in parts.items() if isinstance(value, Tensor)}
    return LogLikelihood(**{**parts, **tensors, "nfe": int(nfe)})


def _check(flow: BaseFlow, data: Tensor, sample_ids: Sequence[int] | Tensor | None) -> Sequence[int] | Tensor:
    """Return the sample ids."""
    if not isinstance(flow, BaseFlow):
        raise InputTypeError(f"got a {type(flow).__name__}, expected a flow; use Flow(backbone, interpolant)")
    if flow.remembers:
        raise InputError("got a flow that depends on earlier calls, which has no likelihood; use one without momentum")
    if not isinstance(data, Tensor) or not data.is_floating_point() or 0 in (data.ndim, *data.shape[1:]):
        came = f"{data.dtype} of shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise InputTypeError(f"got data of type {came}, expected a floating-point tensor (N, *S); call data.float()")
    ids = range(len(data)) if sample_ids is None else sample_ids
    if len(ids) != len(data):
        raise InputError(f"got {len(ids)} sample ids for {len(data)} samples; give one a sample")
    return ids


def _check_probes(probes: int, probe: str, exact: bool, size: int) -> None:
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise InputError(f"got probes {probes!r}, expected a whole number of 1 or more")
    if probe not in get_args(Probe):
        raise UnknownNameError(f"unknown probe {probe!r}; {suggest(probe, get_args(Probe))}")
    if exact and probes > 1:
        raise InputError(f"got {probes} probes for an exact divergence, which needs none; leave one of both out")
    if exact and size > _LARGEST:
        raise InputError(
            f"got exact=True for samples of {size} values, expected at most {_LARGEST}: each costs a vector–Jacobian "
            "product a call; use probes=…"
        )


def _build(solver: SolverSpec, flow: BaseFlow, prior: LogDensity | None) -> Solver:
    """Return the solver from data to noise."""
    named = {"name": solver} if isinstance(solver, str) else solver
    options = {"start": 0.0, "end": 1.0, **named} if isinstance(named, Mapping) else named
    built = registry.build(options)
    if built.needs != ("velocity",):
        raise InputError(
            f"got the solver {type(built).__name__}, which asks for {', '.join(built.needs)}; a likelihood needs one "
            "for the ODE of a velocity, as 'dopri5' or 'heun'"
        )
    built = built.reversed() if built.start > built.end else built
    if prior is None and built.end != 1:
        raise InputError(f"got a solver that ends at t = {built.end:g}, expected 1, noise; or give the prior there")
    if prior is None and isinstance(flow.interpolant, TwoEnded):
        raise InputError(
            f"got a flow on the {type(flow.interpolant).__name__} path, whose source may be anything; give its prior"
        )
    return built


def _kernels(gradients: bool) -> AbstractContextManager[None]:
    """Plain attention where a divergence is differentiated again: fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if gradients else nullcontext()


def _usable(value: Any) -> Any:
    """Return a tensor that autograd takes: one made in inference mode is copied."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _at_the_end(prior: LogDensity | None, x: Tensor) -> Tensor:
    """Return the log-density of what the solve arrives at, (N,): that of standard normal noise, summed in float64."""
    if prior is None:
        rows = x.reshape(len(x), math.prod(x.shape[1:])).double()
        return (-0.5 * rows.square().sum(1) - 0.5 * rows.shape[1] * math.log(2 * math.pi)).to(x)
    value = prior(x)
    if value.shape != x.shape[:1]:
        raise InputError(f"got log-densities of shape {tuple(value.shape)} from the prior, expected ({len(x)},)")
    return value.to(x)


def _bits(log_density: Tensor, size: int, dequantization: Dequantization | None) -> Tensor:
    volume = 0.0 if dequantization is None else size * math.log(dequantization.width)
    return -(log_density + volume) / (size * math.log(2))


def _agreed(seed: int | None, device: torch.device, group: distributed.ProcessGroup | None) -> int:
    """Return the first process's seed, as two halves: 64 bits do not fit an int64."""
    seed = Draws.from_torch().seed if seed is None else Draws(seed).seed
    halves = torch.tensor([seed >> 32, seed & 0xFFFFFFFF], device=device)
    distributed.broadcast(halves, group=group, group_src=0)
    return int(halves[0]) << 32 | int(halves[1])


def _raise_together(failure: Exception | None, device: torch.device, group: distributed.ProcessGroup | None) -> None:
    """Raise in every process if one failed, so that none waits for it."""
    failed = torch.tensor(int(failure is not None), device=device)
    distributed.all_reduce(failed, group=group)
    if failure is not None:
        raise failure
    if int(failed):
        raise SolverError("another process of the sharded likelihood failed", t=0.0, step=0, nfe=0)
