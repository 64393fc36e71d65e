from __future__ import annotations

import importlib
import importlib.util
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from pathline import Flow, backbones, interpolants
from pathline.interpolants import Interpolant

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # its own is shared by all forked processes, and one killed while holding it keeps it
hypothesis.settings.register_profile(
    "pathline",
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "25")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("pathline")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("property")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20250314)


@pytest.fixture
def processes() -> Callable[..., Any]:
    """``run_processes`` of tests/processes.py, which no test can import by name."""
    spec = importlib.util.spec_from_file_location("processes", ROOT / "tests" / "processes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_processes


@pytest.fixture(scope="session")
def torchvision_operators() -> torch.library.Library | None:
    """Let torchvision be imported beside a torch of another build, and with it timm; None where it can be as it is.

    Its native library does not load there, so that the operators which it registers fakes for do not exist: their
    schemas are defined here, for tests alone. Nothing that these run calls them; the library lives as long as they do.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library
    return None


class Case(NamedTuple):
    """A parity case: the authors' weights, inputs and outputs, and its description."""

    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    description: dict


@pytest.fixture
def parity() -> Callable[[str], Case]:
    def load(name: str) -> Case:
        folder = ROOT / "tests" / "parity"
        tensors = load_file(folder / f"{name}.safetensors")
        parts = (
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in ("state/", "in/", "out/")
        )
        return Case(*parts, json.loads((folder / f"{name}.json").read_text()))

    return load


class Gaussian(NamedTuple):
    """The exact flow of data N(mean, std²) along a path, coordinate by coordinate."""

    mean: float
    std: float
    path: Interpolant

    def variance(self, t: Tensor) -> Tensor:
        alpha, sigma, _, _ = self.path.evaluate(t)
        return alpha**2 * self.std**2 + sigma**2

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[α'·data + σ'·noise | x], by the regression of jointly Gaussian variables."""
        alpha, sigma, alpha_rate, sigma_rate = (
            c.reshape(-1, *(1,) * (x.ndim - 1)) if c.ndim else c for c in self.path.evaluate(t)
        )
        variance = alpha**2 * self.std**2 + sigma**2
        covariance = alpha_rate * alpha * self.std**2 + sigma_rate * sigma
        return alpha_rate * self.mean + covariance / variance * (x - alpha * self.mean)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        alpha = self.path.evaluate(t).alpha
        return -(x - alpha * self.mean) / self.variance(t)

    def transported(self, x: Tensor, start: float, end: float) -> Tensor:
        """The ODE's solution: the standardised state is constant along the flow of a Gaussian."""
        t0, t1 = (torch.tensor(t, dtype=torch.float64) for t in (start, end))
        a0, a1 = self.path.evaluate(t0).alpha, self.path.evaluate(t1).alpha
        return a1 * self.mean + (self.variance(t1) / self.variance(t0)).sqrt() * (x - a0 * self.mean)

    def flow(self) -> Flow:
        return Flow(backbones.wrap(lambda x, t: self.velocity(x, t)), self.path)


@pytest.fixture
def gaussian() -> Callable[..., Gaussian]:
    return lambda path="linear", mean=2.0, std=0.5: Gaussian(mean, std, interpolants.build(path))
