"""Solves against the numbers of SiT's program, whose clock runs the other way: t there is 1 − t here.

Its ``num_steps`` counts grid points; its last step of 0.04 is the grid ``paper``. Velocities change their sign.
"""

from __future__ import annotations

import pytest
import torch

from pathline import Flow, backbones, interpolants, solvers

PATHS = {"linear": "linear", "gvp": "trigonometric", "vp": "vp"}
LOOPS = {"euler": "euler-maruyama", "heun": "stochastic-heun"}
RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5}
OWN = ("euler", "midpoint")


def flow_of(path, predicts):
    """The closed-form model of the cases, on our clock."""

    def model(x, t):
        there = (1 - t).reshape(-1, 1, 1, 1)
        value = 0.7 * torch.sin(1.3 * x + 2 * there) - 0.4 * x * torch.cos(3 * there) + 0.1 * there
        return -value if predicts == "velocity" else value

    return Flow(backbones.wrap(model), interpolants.build(PATHS[path]), predicts)


def error(ours, theirs):
    """Largest difference, relative to max(1, largest magnitude), as the cases are stated."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and bool(theirs.isfinite().all())
    return float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))


def numbers(case, dtype):
    """Results of one float type by key."""
    ending = "/" + str(dtype).removeprefix("torch.")
    return {key.removesuffix(ending): value for key, value in case.outputs.items() if key.endswith(ending)}


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_odes(dtype, parity):
    case, compared = parity("transport_ode"), 0
    for key, theirs in numbers(case, dtype).items():
        path, predicts, method, *reverse = key.split("_")
        interval = case.description["intervals"]["_".join([path, predicts, *reverse])]
        options = {"steps": 10, "start": 1 - interval["t0"], "end": 1 - interval["t1"]}
        own = method in OWN
        solver = solvers.build(method, **options) if own else solvers.build("ode", method=method, **options)
        x = solver(flow_of(path, predicts), case.inputs["init"].to(dtype))
        assert error(x, theirs) <= RELATIVE[dtype], key
        compared += 1
    assert compared == 30


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_sdes(path, dtype, parity):
    """Two loops, six diffusions, four last steps, three predictions, on the recorded draws."""
    case, compared = parity(f"transport_sde_{path}"), 0
    tolerance = 3e-4 if (path, dtype) == ("vp", torch.float32) else RELATIVE[dtype]
    for key, theirs in numbers(case, dtype).items():
        if "trajectory" in key:
            continue
        predicts, loop, form, last_step = key.split("_")
        row = (
            f"{predicts}_{'sbdm' if form == 'sbdm' else 'other'}_{'none' if last_step == 'none' else 'with last step'}"
        )
        interval = case.description["intervals"][row]
        plain = last_step == "none"
        solver = solvers.build(
            LOOPS[loop],
            steps=9 if plain else 10,
            grid="uniform" if plain else "paper",
            diffusion=form,
            last_step=last_step,
            start=1 - interval["t0"],
            end=1 - interval["t1"] if plain else 0.0,
        )
        init, draws = case.inputs["init"].to(dtype), case.inputs["draws"].to(dtype)
        x = solver.solve(flow_of(path, predicts), init, increments=draws).x
        assert error(x, theirs) <= tolerance, key
        compared += 1
    assert compared == 64


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm", [1.0, 0.6])
def test_diffusion_forms(path, norm, parity):
    """Theirs is g²/2 on the reversed clock, all six of them."""
    case = parity(f"transport_{path}")
    t = 1 - case.inputs["t_grid"].double()
    for name in solvers.diffusions.names():
        ours = solvers.diffusions.build(name, norm=norm).squared(t, interpolants.build(PATHS[path])) / 2
        theirs = case.outputs[f"diffusion/{name}/norm_{norm}"]
        assert error(ours, theirs.expand_as(ours)) <= 1e-10, name
