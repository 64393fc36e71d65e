"""Overhead of a solver's step: our loops beside the bare loop of the same method, and beside other libraries.

``python benchmarks/solvers.py`` prints microseconds a step, medians over interleaved repetitions in one process and one
thread. All call the same trivial network, −x; ours also hand it the time of every step, which the bare loops leave as
it is. Normal draws are supplied to all loops and timed apart. A missed bar is marked, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pathline import Draws, Flow, backbones, interpolants, solvers

LARGE, SMALL = (64, 4, 32, 32), (4, 4, 4, 4)
STEPS, START, END = 200, 0.95, 0.05
NETWORK = backbones.wrap(lambda x, t: -x)
FLOW = Flow(NETWORK, interpolants.build("linear"))
TIME = {shape[0]: torch.full(shape[:1], 0.5) for shape in (LARGE, SMALL)}
Loop = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One comparison at one size: what ran, beside what, and the bar it is held to."""

    name: str
    ours: Loop
    bare: Loop
    bar: Callable[[float, float], bool] | None
    wanted: str
    steps: int = STEPS


def f(x: Tensor) -> Tensor:
    """The network at no particular time."""
    result: Tensor = NETWORK(x, TIME.get(len(x)))
    return result


def score(x: Tensor, v: Tensor, t: float) -> Tensor:
    return -(x + (1 - t) * v) / t


def grid() -> list[tuple[float, float]]:
    return list(pairwise(torch.linspace(START, END, STEPS + 1, dtype=torch.float64).tolist()))


def euler(x: Tensor) -> Tensor:
    for t, s in grid():
        x = x + (s - t) * f(x)
    return x


def midpoint(x: Tensor) -> Tensor:
    for t, s in grid():
        x = x + (s - t) * f(x + 0.5 * (s - t) * f(x))
    return x


def heun(x: Tensor) -> Tensor:
    for t, s in grid():
        first = f(x)
        second = f(x + (s - t) * first)
        x = x + 0.5 * (s - t) * (first + second)
    return x


def rk4(x: Tensor) -> Tensor:
    for t, s in grid():
        h = s - t
        a = f(x)
        b = f(x + 0.5 * h * a)
        c = f(x + 0.5 * h * b)
        d = f(x + h * c)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


def ab2(x: Tensor) -> Tensor:
    last = None
    for t, s in grid():
        v = f(x)
        x = x + (s - t) * (v if last is None else 1.5 * v - 0.5 * last)
        last = v
    return x


def ab3(x: Tensor) -> Tensor:
    history: list[Tensor] = []
    for t, s in grid():
        v, h = f(x), s - t
        if len(history) == 2:
            x = x + h / 12 * (23 * v - 16 * history[1] + 5 * history[0])
        elif history:
            x = x + h * (1.5 * v - 0.5 * history[0])
        else:
            x = x + h * f(x + 0.5 * h * v)
        history = [*history[-1:], v]
    return x


def dpm(x: Tensor) -> Tensor:
    last = None
    for t, s in grid():
        data = x - t * f(x)
        now, there = math.log((1 - t) / t), math.log((1 - s) / s)
        h = there - now
        value = data if last is None else data + h / (2 * last[1]) * (data - last[0])
        x = s / t * x - (1 - s) * math.expm1(-h) * value
        last = (data, h)
    return x


def unipc(x: Tensor) -> Tensor:
    """Order 2: corrector of the step before, then the predictor."""
    last: list[tuple[float, Tensor]] = []
    state = x
    for t, s in grid():
        data = x - t * f(x)
        if last:
            x = unified(state, last, t, data)
        last, state = [*last[-1:], (t, data)], x
        x = unified(state, last, s, None)
    return x


def unified(x: Tensor, nodes: list[tuple[float, Tensor]], t: float, ahead: Tensor | None) -> Tensor:
    (s, data), half = nodes[-1], [math.log((1 - u) / u) for u, _ in nodes]
    h = math.log((1 - t) / t) - half[-1]
    weight = -(1 - t) * math.expm1(-h)
    base = t / s * x + weight * data
    if len(nodes) == 1:
        return base if ahead is None else base + weight * 0.5 * (ahead - data)
    r = (half[0] - half[1]) / h
    earlier = (nodes[0][1] - data) / r
    if ahead is None:
        return base + weight * 0.5 * earlier
    z = -h
    first = (math.expm1(z) / z - 1) / math.expm1(z)
    second = 2 * ((math.expm1(z) / z - 1) / z - 0.5) / math.expm1(z)
    b = (second - r * first) / (1 - r)
    return base + weight * ((first - b) * earlier + b * (ahead - data))


def exponential(x: Tensor, z: Tensor) -> Tensor:
    for i, (t, s) in enumerate(grid()):
        v = f(x)
        data, noise = x - t * v, x + (1 - t) * v
        spread = s * math.sqrt(1 - ((1 - t) * s / ((1 - s) * t)) ** 2)
        x = (1 - s) * data + math.sqrt(s**2 - spread**2) * noise + spread * z[i]
    return x


def euler_maruyama(x: Tensor, z: Tensor) -> Tensor:
    for i, (t, s) in enumerate(grid()):
        v = f(x)
        x = x + (s - t) * (v - t * score(x, v, t)) + math.sqrt(2 * t * (t - s)) * z[i]
    return x


def stochastic_heun(x: Tensor, z: Tensor) -> Tensor:
    for i, (t, s) in enumerate(grid()):
        x = x + math.sqrt(2 * t * (t - s)) * z[i]
        v = f(x)
        first = v - t * score(x, v, t)
        y = x + (s - t) * first
        w = f(y)
        x = x + 0.5 * (s - t) * (first + w - s * score(y, w, s))
    return x


def srk(x: Tensor, z: Tensor) -> Tensor:
    for i, (t, s) in enumerate(grid()):
        h, node = t - s, t - 0.75 * (t - s)
        g, g_end = math.sqrt(2 * t), math.sqrt(2 * s)
        increment = math.sqrt(h) * z[2 * i]
        ratio = 0.5 * increment + math.sqrt(h / 12) * z[2 * i + 1]
        v = f(x)
        first = t * score(x, v, t) - v
        y = x + 0.75 * h * first + 1.5 * g_end * ratio
        w = f(y)
        second = node * score(y, w, node) - w
        x = x + h / 3 * first + 2 * h / 3 * second + g_end * increment + (g - g_end) * ratio
    return x


def predictor_corrector(x: Tensor, z: Tensor) -> Tensor:
    for i, (t, s) in enumerate(grid()):
        v = f(x)
        x = (1 - s) * (x - t * v) + s * (x + (1 - t) * v)
        length = 2 * (0.16 * s) ** 2
        x = x + length * score(x, f(x), s) + math.sqrt(2 * length) * z[i]
    return x


def churn(x: Tensor, z: Tensor) -> Tensor:
    for i, (t, s) in enumerate(grid()):
        ratio = (1 + min(40 / STEPS, math.sqrt(2) - 1)) * t / (1 - t)
        later = ratio / (1 + ratio)
        shrink = (1 - later) / (1 - t)
        x = shrink * x + math.sqrt(later**2 - (shrink * t) ** 2) * z[i]
        v = f(x)
        if i == STEPS - 1:
            return (1 - s) * (x - later * v) + s * (x + (1 - later) * v)
        w = f(x + (s - later) * v)
        x = x + 0.5 * (s - later) * (v + w)
    return x


ODES = {
    "euler": euler,
    "midpoint": midpoint,
    "heun": heun,
    "rk4": rk4,
    "ab2": ab2,
    "ab3": ab3,
    "dpm++": dpm,
    "unipc": unipc,
}
SDES = {
    "euler-maruyama": euler_maruyama,
    "stochastic-heun": stochastic_heun,
    "srk": srk,
    "exponential": exponential,
    "predictor-corrector": predictor_corrector,
    "churn": churn,
}
LOOPS = ("euler-maruyama", "stochastic-heun", "srk")


def stochastic(name: str) -> dict[str, object]:
    """Options that make one of our loops the bare one."""
    return {"grid": "uniform", "diffusion": "linear", "last_step": "none"} if name in LOOPS else {}


def own_rows(shape: tuple[int, ...]) -> list[Row]:
    """Our loops."""
    x, wanted = torch.randn(shape), "≤ 0.8 ×" if shape == LARGE else "≤ 10 µs above"
    normal = torch.randn(2 * STEPS, *shape)

    def bar(ours: float, bare: float) -> bool:
        return ours <= 0.8 * bare if shape == LARGE else ours <= bare + 10

    rows = []
    for name, loop in ODES.items():
        solver = solvers.build(name, steps=STEPS, start=START, end=END)
        rows.append(Row(name, lambda s=solver: s(FLOW, x, seed=0), lambda b=loop: b(x), bar, wanted))
    for name, loop in SDES.items():
        solver = solvers.build(name, steps=STEPS, start=START, end=END, **stochastic(name))
        z = normal[: solver.increments_shape(x)[0]]
        rows.append(
            Row(name, lambda s=solver, z=z: s(FLOW, x, increments=z, seed=0), lambda b=loop, z=z: b(x, z), bar, wanted)
        )
    return rows


def library_rows(shape: tuple[int, ...]) -> list[Row]:
    """The back-ends, flow_matching's solver and diffusers' scheduler, where installed."""
    x, z, large = torch.randn(shape), torch.randn(STEPS, *shape), shape == LARGE
    rows = []
    if importlib.util.find_spec("torchdiffeq"):
        solver = solvers.build("ode", method="euler", steps=STEPS, start=START, end=END)
        limit = 150 if large else 60
        rows.append(
            Row(
                "ode: torchdiffeq euler",
                lambda: solver(FLOW, x, seed=0),
                lambda: euler(x),
                lambda ours, bare: ours <= bare + limit,
                f"≤ {limit} µs above",
            )
        )
    if importlib.util.find_spec("torchsde"):
        options = {**stochastic("euler-maruyama"), "start": START, "end": END}
        backend = solvers.build("sde", method="euler", steps=STEPS, **options)
        rows.append(
            Row(
                "sde: torchsde euler",
                lambda: backend(FLOW, x, increments=z, seed=0),
                lambda: euler_maruyama(x, z),
                lambda ours, bare: ours <= 1.2 * bare if large else ours <= bare + 40,
                "≤ 1.2 ×" if large else "≤ 40 µs above",
            )
        )
    if importlib.util.find_spec("flow_matching"):
        from flow_matching.solver import ODESolver

        theirs = ODESolver(velocity_model=lambda x, t: f(x))
        times = torch.linspace(START, END, STEPS + 1)
        rows.append(
            Row(
                "flow_matching euler",
                lambda: theirs.sample(x, None, method="euler", time_grid=times),
                lambda: euler(x),
                None,
                "",
            )
        )
    if importlib.util.find_spec("diffusers"):
        rows.append(Row("diffusers FlowMatchEuler", lambda: diffusers_euler(x), lambda: euler(x), None, ""))
    return rows


def diffusers_euler(x: Tensor) -> Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        x = scheduler.step(f(x), t, x, return_dict=False)[0]
    return x


def dormand_prince(shape: tuple[int, ...]) -> Row | None:
    """Ours beside the library's, both by the accepted and rejected steps that they took, with the drift −30x."""
    if not importlib.util.find_spec("torchdiffeq"):
        return None
    x, flow = torch.randn(shape), Flow(backbones.wrap(lambda x, t: x.mul(-30)), FLOW.interpolant)
    options = {"rtol": 1e-6, "atol": 1e-6, "start": START, "end": END}
    ours, theirs = solvers.build("dopri5", **options), solvers.build("ode", method="dopri5", **options)
    rounds = [(solver.solve(flow, x).nfe - 2) / 6 for solver in (ours, theirs)]
    scale = rounds[0] / rounds[1]
    return Row(
        "dopri5 beside torchdiffeq's",
        lambda: ours(flow, x, seed=0),
        lambda: theirs(flow, x, seed=0),
        lambda mine, library: mine * 8 <= library * scale,
        "≥ 8 × faster a step",
        round(rounds[0]),
    )


def measure(row: Row, repetitions: int) -> tuple[float, float]:
    """Return microseconds a step of ours and of the bare loop, each the median of interleaved runs."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions + 1):
        for loop, found in zip((row.ours, row.bare), times, strict=True):
            began = time.perf_counter()
            loop()
            found.append((time.perf_counter() - began) / row.steps * 1e6)
    ours, bare = (statistics.median(found[1:]) for found in times)
    return ours, bare


def report(title: str, rows: Sequence[Row | None], repetitions: int) -> int:
    """Print a table and return the number of bars missed."""
    print(f"\n{title}\n| loop | µs a step | bare | ratio | above bare | bar |\n|---|---|---|---|---|---|")
    missed = 0
    for row in filter(None, rows):
        ours, bare = measure(row, repetitions)
        verdict = "" if row.bar is None else f"{row.wanted}: {'met' if row.bar(ours, bare) else 'MISSED'}"
        missed += verdict.endswith("MISSED")
        print(
            f"| {row.name} | {ours:.1f} | {bare:.1f} | {ours / bare:.2f} | {ours - bare:+.1f} | {verdict} |", flush=True
        )
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all comparisons; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Overhead of a solver's step, beside bare loops and other libraries.")
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args(arguments).repetitions
    torch.set_num_threads(1)
    missed = 0
    with torch.no_grad():
        for shape in (LARGE, SMALL):
            title = f"State {shape}, {STEPS} steps, drift −x, one thread, medians of {repetitions}:"
            rows = [*own_rows(shape), *library_rows(shape)]
            missed += report(title, [*rows, dormand_prince(shape) if shape == LARGE else None], repetitions)
            began = time.perf_counter()
            Draws(0).normal("increments", range(shape[0]), shape[1:])
            print(f"Normal draws of one step, apart: {(time.perf_counter() - began) * 1e6:.0f} µs")
    print(f"\n{missed} bars missed" if missed else "\nall bars met")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
