"""docs/knobs.md: its programs run, its names and defaults exist, and its numbers are those of the other programs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from pathline import Draws, Flow, backbones, interpolants, solvers
from pathline.core import listing
from pathline.core.config import Configuration
from pathline.core.registry import registries
from pathline.interpolants import clocks
from pathline.objectives import times as time_laws
from pathline.plugins.flow_matching import as_velocity_model
from pathline.solvers import guidance

assert listing  # imports every registry

PAGE = (Path(__file__).parent.parent / "docs" / "knobs.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
PROGRAMS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in SECTIONS.items()}
PRELUDE = re.findall(r"```python\n(.*?)```", PAGE.split("\n## ")[0], re.DOTALL)
COMPONENT = re.compile(r"^([a-z.]+): ([a-z0-9+-]+)\((.*)\)$")


def rows(section: str) -> list[list[str]]:
    """The cells of every row of a section's tables, without heads and rules."""
    found = [line.strip("| ").split(" | ") for line in SECTIONS[section].splitlines() if line.startswith("| ")]
    assert all(2 <= len(cells) <= 3 for cells in found), found
    return [cells for cells in found if cells[1] != "ours"]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def scope_of(section: str) -> dict[str, Any]:
    """The names that a section's program leaves behind; it continues the first one."""
    scope: dict[str, Any] = {}
    for program in [*PRELUDE, *PROGRAMS[section]]:
        exec(compile(program, f"knobs.md, {section}", "exec"), scope)
    return scope


def difference(ours: Any, theirs: Any) -> float:
    first, second = (torch.as_tensor(values, dtype=torch.float64) for values in (ours, theirs))
    assert first.shape == second.shape
    return float((first - second).abs().max())


def labelled(shape: tuple[int, ...] = (3, 5, 7)) -> Flow:
    """A flow of three classes without noise in its answers."""
    table = torch.randn(4, *shape)

    def network(x, t, label):
        return torch.tanh(x) * (1 + t.reshape(-1, 1, 1, 1)) + table[label]

    return Flow(backbones.wrap(network, num_classes=3, null_label=3), interpolants.build("linear"))


# ---- the page


def test_lines_are_short_and_every_section_has_a_program():
    assert max(map(len, PAGE.splitlines())) <= 140
    assert len(PRELUDE) == 1
    missing = [section for section, programs in PROGRAMS.items() if len(programs) != 1]
    assert missing == ["Network and training of the three"]


@pytest.mark.parametrize("section", [name for name, programs in PROGRAMS.items() if programs])
def test_programs_run(section):
    scope = scope_of(section)
    assert scope["images"].shape == scope["noise"].shape and bool(scope["images"].isfinite().all())


def component_problems(place: str, name: str, arguments: str) -> list[str]:
    registry = registries()[place]
    options = registry.entry(name).options()
    call = ast.parse(f"f({arguments})", mode="eval").body
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    problems = [
        f"{option} has a default" for option in call.args if options[option.id].default is not inspect.Parameter.empty
    ]
    return problems + [f"{key}={value}" for key, value in given.items() if repr(options[key].default) != repr(value)]


def entry_problems(entry: str) -> list[str]:
    path, _, value = entry.partition("=")
    model: type[BaseModel] = Configuration
    *sections, last = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    field = model.model_fields[last]
    fits = field.is_required() if not value else repr(field.default) == value
    return [] if fits else [entry]


def imported(path: str) -> Any:
    """What a dotted name stands for."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


@pytest.mark.parametrize("section", SECTIONS)
def test_our_column_names_what_exists_with_its_defaults(section):
    for cells in rows(section):
        for text in quoted(cells[1]):
            if found := COMPONENT.match(text):
                assert not component_problems(*found.groups()), text
            elif text.startswith("config: "):
                assert not entry_problems(text.removeprefix("config: ")), text
            else:
                assert text.startswith("pathline."), text
                assert callable(imported(text))
        assert quoted(cells[1]) or cells[1] == "none", cells


def test_names_of_ours_in_the_last_column_exist():
    for section in SECTIONS:
        for text in [text for cells in rows(section) for cell in cells[2:] for text in quoted(cell)]:
            if text.startswith("config: "):
                assert not entry_problems(text.removeprefix("config: ")), text
            elif text.startswith("pathline."):
                assert callable(imported(text))


def test_names_of_ours_in_the_notes_exist():
    prose = [line for line in re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL).splitlines() if line[:1] != "|"]
    found = [match.groups() for line in prose for text in quoted(line) if (match := COMPONENT.match(text))]
    assert [name for _, name, _ in found] == ["euler", "ode", "sde"]
    assert not any(component_problems(*parts) for parts in found)


# ---- defaults of the installed programs


def named(section: str) -> dict[str, set[str]]:
    """Knob -> the defaults that a section gives it, from cells of the form `name=default`."""
    found: dict[str, set[str]] = {}
    for text in [text for cells in rows(section) for cell in cells for text in quoted(cell)]:
        if re.match(r"^[\w]+=", text):
            name, _, value = text.partition("=")
            found.setdefault(name, set()).add(value)
    return found


def check_defaults(section: str, function: Any, skipped: set[str]) -> None:
    knobs, text = named(section), SECTIONS[section]
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skipped or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            assert f"`{name}" in text, name
        else:
            short = re.sub("^(adaptive_projected_guidance_(?=norm_dim)|auto_guidance_(?=config))", "", name)
            assert repr(parameter.default) in knobs.get(short, set()), (function, name, parameter.default)


HANDED = {"self", "device", "model_output", "timestep", "sample", "return_dict"}


@pytest.mark.parametrize("name", ["Euler", "Heun", "LCM"])
def test_every_knob_of_diffusers_schedulers_is_there_with_its_default(name):
    diffusers = pytest.importorskip("diffusers")
    word = name if name == "LCM" else f"{name}Discrete"
    scheduler = getattr(diffusers, f"FlowMatch{word}Scheduler")
    for function in (scheduler.__init__, scheduler.set_timesteps, scheduler.step):
        check_defaults("diffusers", function, HANDED | {"num_inference_steps"})


@pytest.mark.parametrize(
    "name",
    ["ClassifierFreeGuidance", "ClassifierFreeZeroStarGuidance", "AdaptiveProjectedGuidance", "AutoGuidance"],
)
def test_every_knob_of_diffusers_guiders_is_there_with_its_default(name):
    guiders = pytest.importorskip("diffusers.guiders")
    check_defaults("diffusers", getattr(guiders, name).__init__, {"self"})


def test_every_knob_of_flow_matching_is_there_with_its_default():
    library = pytest.importorskip("flow_matching.solver")
    scheduler = pytest.importorskip("flow_matching.path.scheduler")
    passed = {"self", "x_init", "x_1"}
    check_defaults("flow_matching", library.ODESolver.sample, passed)
    check_defaults("flow_matching", library.ODESolver.compute_likelihood, passed | {"time_grid"})
    for name in ("CondOT", "Cosine", "VP", "LinearVP", "PolynomialConvex"):
        factory = getattr(scheduler, f"{name}Scheduler")
        assert f"`{name}Scheduler`" in SECTIONS["flow_matching"]
        check_defaults("flow_matching", factory.__init__, {"self"})


# ---- numbers of SiT, REPA and LightningDiT, from their formulas


def test_sits_points_are_counted_as_it_counts_them():
    scope = scope_of("SiT")
    with_last_step = [*(1 - torch.linspace(0, 1 - 0.04, 250, dtype=torch.float64)).tolist(), 0.0]
    points = 1 - torch.linspace(0, 1, 250, dtype=torch.float64)
    assert difference(scope["sit_sde"].times, with_last_step) < 1e-12
    assert difference(scope["sit_sde_no_last"].times, points) < 1e-12
    assert difference(scope["sit_euler"].times, points) < 1e-12
    assert (scope["sit_ode"].rtol, scope["sit_ode"].atol) == (1e-3, 1e-6)


def test_sits_sde_step_by_step():
    """x ← x + (v + w·s)·h + √(2wh)·z on its clock, w = σ = 1 − t; its last step has the mean alone."""
    solver, flow = scope_of("SiT")["sit_sde"], labelled((3, 2, 4))
    start, label = torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.tensor([0, 2])
    draws = torch.randn(249, *start.shape, dtype=torch.float64)

    def drift(x, t):
        velocity = -flow.backbone(x, torch.full((2,), 1 - t, dtype=x.dtype), label=label)
        score = (t * velocity - x) / (1 - t)  # of t·data + (1 − t)·noise
        return velocity + (1 - t) * score

    x, times = start, torch.linspace(0, 0.96, 250, dtype=torch.float64)
    step = float(times[1] - times[0])
    for t, z in zip(times[:-1].tolist(), draws, strict=True):
        x = x + drift(x, t) * step + (2 * (1 - t) * step) ** 0.5 * z
    x = x + drift(x, 0.96) * 0.04
    assert difference(solver.solve(flow, start, increments=draws, label=label).x, x) < 1e-10


def test_repas_two_modes():
    """Its grid has N steps; Heun's rule but for the last step, which is Euler's."""
    scope, flow = scope_of("REPA"), labelled((3, 2, 4))
    points = [*torch.linspace(1, 0.04, 250, dtype=torch.float64).tolist(), 0.0]
    assert difference(scope["repa"].times, points) < 1e-12
    assert scope["repa_guidance"].interval == (0.0, 0.7) and scope["images"].dtype == torch.float64
    start, label = torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.tensor([1, 2])

    def velocity(x, t):
        return flow.backbone(x, torch.full((2,), t, dtype=x.dtype), label=label)

    x, times = start, torch.linspace(1, 0, 51, dtype=torch.float64).tolist()
    for number, (t, after) in enumerate(pairwise(times)):
        first = velocity(x, t)
        slope = first if number == 49 else (first + velocity(x + (after - t) * first, after)) / 2
        x = x + (after - t) * slope
    solution = scope["repa_heun"].solve(flow, start, label=label)
    assert solution.nfe == 99 and difference(solution.x, x) < 1e-10


def test_lightningdits_grid_and_guidance():
    scope, flow = scope_of("LightningDiT"), labelled((7, 2, 3))
    there = torch.linspace(0, 1, 250, dtype=torch.float64)
    assert difference(scope["lightning"].times, 1 - 0.3 * there / (1 + (0.3 - 1) * there)) < 1e-12
    assert scope["interval"] == (0.0, 0.875)
    x, label, null = torch.randn(2, 7, 2, 3), torch.tensor([0, 2]), torch.tensor([3, 3])
    for time in (0.1249, 0.125, 0.3, 1.0):  # its clock
        t = torch.full((2,), 1 - time)
        given, without = (flow.backbone(x, t, label=y) for y in (label, null))
        expected = given.clone()
        if time >= 0.125:
            expected[:, :3] = without[:, :3] + 6.7 * (given[:, :3] - without[:, :3])
        assert difference(scope["lightning_guidance"](flow)(x, t, label=label).velocity, expected) < 1e-5


def test_logit_normal_of_the_reversed_clock_has_the_mean_of_the_other_sign():
    normal = Draws(0).at(range(5)).normal("time")
    ours = time_laws.build("logit-normal", mean=-0.7, std=1.3).sample(Draws(0).at(range(5)))
    assert difference(1 - ours, (0.7 - 1.3 * normal).sigmoid()) < 1e-6


# ---- numbers of diffusers and flow_matching, from the libraries


def sigmas(scheduler: str, options: dict[str, Any], **call: Any) -> list[float]:
    made = getattr(pytest.importorskip("diffusers"), scheduler)(**options)
    made.set_timesteps(**call)
    return made.sigmas.tolist()


def test_grids_are_those_of_diffusers():
    scope, euler = scope_of("diffusers"), "FlowMatchEulerDiscreteScheduler"
    given = np.linspace(1, 1 / 28, 28)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    dynamic = {"use_dynamic_shifting": True}
    heun = sigmas("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, num_inference_steps=28)
    multistep = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    theirs = {
        "sd3": sigmas(euler, {"shift": 3.0}, num_inference_steps=28),
        "shifted": sigmas(euler, {"shift": 3.0}, sigmas=given),
        "flux": sigmas(euler, dynamic, sigmas=given, mu=mu),
        "ltx": sigmas(euler, {**dynamic, "shift_terminal": 0.1}, sigmas=given, mu=mu),
        "karras": sigmas(euler, {"use_karras_sigmas": True}, num_inference_steps=28),
        "heun": [*heun[:1], *heun[1:-1:2], *heun[-1:]],  # each inner one stands twice
        "dpm": sigmas("DPMSolverMultistepScheduler", multistep, num_inference_steps=28),
    }
    for name, expected in theirs.items():
        assert difference(scope[name].times, expected) < 1e-6, name


def flow_and_noise() -> tuple[Flow, torch.Tensor]:
    """Data N(2, ¼), and its exact velocity."""

    def velocity(x, t):
        t = t.reshape(-1, 1)
        return (t - 0.25 * (1 - t)) / (t**2 + 0.25 * (1 - t) ** 2) * (x - 2 * (1 - t)) - 2

    return Flow(backbones.wrap(velocity), interpolants.build("linear")), torch.randn(5, 3)


@pytest.mark.parametrize("scheduler", ["FlowMatchHeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_methods_are_those_of_diffusers(scheduler):
    """On the grids of theirs; the network sees σ, as their timesteps are cut."""
    diffusers, (flow, noise) = pytest.importorskip("diffusers"), flow_and_noise()
    heun = scheduler.startswith("FlowMatch")
    flows = {} if heun else {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    theirs = getattr(diffusers, f"{scheduler}Scheduler")(**({"shift": 3.0} if heun else flows))
    theirs.set_timesteps(20)
    levels, x = theirs.sigmas.tolist(), noise
    for number, timestep in enumerate(theirs.timesteps):
        t = float(timestep) / 1000 if heun else levels[number]
        x = theirs.step(flow.backbone(x, torch.full((5,), t)), timestep, x).prev_sample
    points = [*levels[:1], *levels[1:-1:2], 0.0] if heun else levels
    name, options = {"F": ("churn", {"churn": 0.0}), "D": ("dpm++", {}), "U": ("unipc", {})}[scheduler[0]]
    grid = {"name": "custom", "points": points}
    solution = solvers.build(name, steps=20, grid=grid, start=points[0], **options).solve(flow, noise)
    assert solution.nfe == len(theirs.timesteps) and difference(solution.x, x) < 1e-5


def test_the_exponential_sde_is_that_of_diffusers_dpm_solver():
    diffusers, (flow, noise) = pytest.importorskip("diffusers"), flow_and_noise()
    flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    theirs = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, **flows)
    theirs.set_timesteps(7)
    levels, draws, x = theirs.sigmas.tolist(), torch.randn(7, 5, 3), noise
    for t, timestep, z in zip(levels, theirs.timesteps, draws, strict=False):
        x = theirs.step(flow.backbone(x, torch.full((5,), t)), timestep, x, variance_noise=z).prev_sample
    solver = solvers.build("exponential", steps=7, grid={"name": "custom", "points": levels}, start=levels[0])
    assert difference(solver.solve(flow, noise, increments=draws[:-1]).x, x) < 1e-5


def guided(guider: Any, given: torch.Tensor, without: torch.Tensor, step: int = 5) -> torch.Tensor:
    guider.set_state(step=step, num_inference_steps=28, timestep=torch.tensor(500.0))
    made = guider.forward(given, without)
    return made.pred if hasattr(made, "pred") else made[0]


GUIDERS = [
    ("ClassifierFreeGuidance", {}, "classifier-free", 0, {}),
    ("ClassifierFreeGuidance", {"guidance_rescale": 0.7}, "classifier-free", 0, {"rescale": 0.7}),
    ("ClassifierFreeGuidance", {"use_original_formulation": True}, "classifier-free", 1, {}),
    ("ClassifierFreeZeroStarGuidance", {"zero_init_steps": 0}, "cfg-zero", 0, {}),
    (
        "AdaptiveProjectedGuidance",
        {"use_original_formulation": True, "eta": 0.3, "adaptive_projected_guidance_rescale": 2.0},
        "apg",
        1,
        {"quantity": "velocity", "eta": 0.3, "norm": 2.0},
    ),
]


@pytest.mark.parametrize(("guider", "options", "name", "more", "ours"), GUIDERS)
def test_guidance_is_that_of_diffusers(guider, options, name, more, ours):
    guiders, flow = pytest.importorskip("diffusers.guiders"), labelled()
    x, t, label = torch.randn(2, 3, 5, 7), torch.tensor([0.4, 0.4]), torch.tensor([0, 2])
    given, without = (flow.backbone(x, t, label=y) for y in (label, torch.tensor([3, 3])))
    theirs = guided(getattr(guiders, guider)(guidance_scale=4.0, **options), given, without)
    made = guidance.build(name, scale=4.0 + more, **ours)(flow)(x, t, label=label).velocity
    assert difference(made, theirs) < 1e-5


def test_parts_of_steps_are_the_interval_of_the_page():
    guiders, scope = pytest.importorskip("diffusers.guiders"), scope_of("diffusers")
    guider = guiders.ClassifierFreeGuidance(guidance_scale=7.5, start=0.1, stop=0.6)
    low, high = scope["part"].interval
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    active = [float(guided(guider, one, zero, step)) == 7.5 for step in range(28)]
    assert active == [low <= t <= high for t in scope["times"][:-1]] and sum(active) == 14


def test_zero_start_is_k_steps_of_euler():
    guiders, flow, solver = pytest.importorskip("diffusers.guiders"), labelled(), solvers.build("euler", steps=7)
    zero = guidance.build("cfg-zero", scale=4.0, zero_above=solver.times[2])(flow)
    guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=2)
    x, label = torch.randn(2, 3, 5, 7), torch.tensor([0, 2])
    for step, time in enumerate(solver.times[:-1]):
        t = torch.full((2,), time, dtype=torch.float64)
        given, without = (flow.backbone(x, t.float(), label=y) for y in (label, torch.tensor([3, 3])))
        theirs = guided(guider, given, without, step)
        assert difference(zero(x, t, label=label).velocity, theirs) < 1e-5
        assert bool((theirs == 0).all()) == (step < 2)


def test_midpoint_is_that_of_flow_matching():
    library, (flow, noise) = pytest.importorskip("flow_matching.solver"), flow_and_noise()
    scope, theirs = scope_of("flow_matching"), library.ODESolver(as_velocity_model(flow))
    x = theirs.sample(x_init=noise, step_size=0.05, method="midpoint")
    assert difference(scope["midpoint"](flow, noise), x) < 1e-5
    falling = torch.tensor([1.0, 0.0])
    back = theirs.sample(x_init=x, step_size=0.05, method="midpoint", time_grid=falling)
    assert difference(scope["midpoint"].reversed()(flow, x), back) < 1e-5


def test_edms_grid_of_flow_matchings_example():
    """Its σ by EDM's Eq. 5 with 50 values and 0, at 1/(1 + σ) of its clock."""
    steps = torch.arange(50, dtype=torch.float64) / 49
    sigma = (80 ** (1 / 7) + steps * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    theirs = 1 / (1 + torch.cat((sigma, torch.zeros(1, dtype=torch.float64))))
    scope = scope_of("flow_matching")
    assert difference(scope["example"].times, 1 - theirs) < 1e-12
    assert difference(scope["example"].times, clocks.grid(theirs, source="flow-matching")) < 1e-12
    assert scope["example_guidance"].scale == pytest.approx(1.2)
