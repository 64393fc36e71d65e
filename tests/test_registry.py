from __future__ import annotations

import sys
import types
import warnings
from importlib.metadata import EntryPoint

import pytest

from pathline import (
    InputTypeError,
    PluginError,
    UnknownNameError,
    UnknownOptionError,
    backbones,
    interpolants,
    objectives,
    solvers,
)
from pathline.core import registry as module
from pathline.core.registry import Plugins, Registry, registries


class Shape:
    def __init__(self, side: int, *, colour: str = "red"):
        self.side, self.colour = side, colour


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.setattr(module, "_registries", dict(module._registries))
    monkeypatch.setattr(module, "plugins", Plugins(lambda: []))
    return Registry("shape", "shapes", Shape)


def test_build_by_name_alias_mapping_and_instance(shapes):
    shapes.register("square", aliases=("quadrat",))(Shape)
    assert shapes.build("square", side=3).side == 3
    assert shapes.build("quadrat", side=2, colour="blue").colour == "blue"
    assert shapes.build({"name": "square", "side": 5}, colour="green").side == 5
    made = Shape(7)
    assert shapes.build(made) is made
    assert shapes.names() == ["square"]


def test_unknown_name_gives_nearest_and_all(shapes):
    shapes.register("square")(Shape)
    shapes.register("circle")(lambda radius: Shape(radius))
    with pytest.raises(UnknownNameError, match=r"unknown shape 'sqare'; did you mean 'square'\? Known: circle, square"):
        shapes.build("sqare")


def test_unknown_and_missing_options(shapes):
    shapes.register("square")(Shape)
    with pytest.raises(UnknownOptionError, match=r"no option 'color'; did you mean 'colour'\? Known: colour, side"):
        shapes.build("square", side=1, color="red")
    with pytest.raises(UnknownOptionError, match="needs the option 'side'"):
        shapes.build("square")
    with pytest.raises(UnknownOptionError, match="without a name"):
        shapes.build({"side": 3})
    with pytest.raises(UnknownOptionError, match="beside a finished shape"):
        shapes.build(Shape(1), side=2)
    with pytest.raises(InputTypeError, match="got int for a shape, expected a name or a Shape"):
        shapes.build(3)


def test_a_duplicate_names_both_owners(shapes):
    shapes.register("square")(Shape)

    class Other(Shape):
        pass

    with pytest.raises(UnknownNameError, match=r"'square' is registered twice: by .*Shape and by .*Other"):
        shapes.register("square")(Other)
    with pytest.raises(UnknownNameError, match="'square' is registered twice"):
        shapes.register("rhombus", aliases=("square",))(Other)
    shapes.register("square")(Shape)  # the same class again, as when a notebook cell is run twice


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "pathline.plugins")


def test_plugins_are_loaded_when_first_needed(shapes, monkeypatch):
    fake = types.ModuleType("fake_plugin")
    loads = []

    def importing(name):
        loads.append(name)
        shapes.register("star")(Shape)
        return fake

    monkeypatch.setattr(module, "plugins", Plugins(lambda: [point("fake", "fake_plugin")]))
    monkeypatch.setattr(module.importlib, "import_module", importing)
    shapes.register("square")(Shape)
    shapes.build("square", side=1)
    assert loads == []
    assert shapes.build("star", side=2).side == 2
    assert shapes.names() == ["square", "star"] and loads == ["fake_plugin"]


def test_a_broken_plugin_warns_once_and_raises_chained_when_asked_for(shapes, monkeypatch, tmp_path):
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no such device')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "plugins", Plugins(lambda: [point("broken", "broken_plugin"), point("ok", "math")]))
    shapes.register("square")(Shape)
    with pytest.warns(UserWarning, match=r"plugin 'broken' \(broken_plugin\) failed to import: RuntimeError"):
        shapes.names()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shapes.build("square", side=1).side == 1
        with pytest.raises(PluginError, match="'broken', which may bring it") as caught:
            shapes.build("broken")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_two_plugins_of_one_name_are_refused(shapes, monkeypatch):
    monkeypatch.setattr(module, "plugins", Plugins(lambda: [point("a", "math"), point("a", "json")]))
    with pytest.raises(PluginError, match=r"two plugins named 'a': 'a' \(math\) and 'a' \(json\)"):
        shapes.names()


def test_our_plugin_is_found_by_its_entry_point():
    assert "deepflow" in backbones.names()
    assert sys.modules["pathline.plugins.deepflow"].DeepFlow is backbones.registry.entry("deepflow").factory


def test_options_of_a_trunk_are_the_backbones_own():
    known = backbones.registry.entry("deepflow").options({})
    assert {"cuts", "acceleration_width", "patch_size", "query_key_norm"} <= set(known)
    with pytest.raises(UnknownOptionError, match="did you mean 'acceleration_width'"):
        backbones.build("deepflow", size="S", acceleration_widht=3)
    with pytest.raises(UnknownNameError, match="unknown backbone 'sti'; did you mean 'sit'"):
        backbones.build("deepflow", size="S", trunk="sti")


@pytest.mark.parametrize("registry", registries().values(), ids=registries())
def test_every_registry_refuses_unknown_names_and_options(registry):
    with pytest.raises(UnknownNameError, match="unknown"):
        registry.build("nonesuch")
    for name in registry.names():
        with pytest.raises(UnknownOptionError, match="has no option 'nonesuch'"):
            registry.build(name, nonesuch=1)


def test_names_users_rely_on():
    couplings = {"independent", "exact", "sinkhorn", "class-conditional", "conditional", "partial"}
    assert set(interpolants.couplings.names()) == couplings
    laws = {"uniform", "logit-normal", "mode", "cosmap", "lognormal", "u-shaped", "shifted", "stratified"}
    assert laws == set(objectives.times.names())
    weights = {"none", "velocity", "likelihood", "sigma-sqrt", "cosmap", "min-snr"}
    assert weights == set(objectives.weightings.names())
    trained = {"velocity", "score", "noise", "data", "contrastive", "mean-flow", "alignment"}
    assert trained <= set(objectives.names())
    paths = {"linear", "trigonometric", "vp", "polynomial", "linear-vp", "two-ended", "bridge", "stochastic"}
    assert paths <= set(interpolants.names())
    steps = {"euler", "heun", "midpoint", "rk4", "dopri5", "ab2", "ab3", "dpm++", "unipc", "euler-maruyama"}
    steps |= {"stochastic-heun", "srk", "exponential", "predictor-corrector", "churn"}
    assert steps <= set(solvers.names())
    grids = {"uniform", "paper", "shifted", "dynamic-shift", "terminal", "edm", "custom"}
    assert grids == set(solvers.grids.names())
    diffusions = {"constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"}
    assert diffusions == set(solvers.diffusions.names())
    core, branches = {"classifier-free", "autoguidance", "cfg-zero", "apg"}, {"branch", "look-ahead", "internal"}
    assert core | branches == set(solvers.guidance.names())
    assert interpolants.registry.aliases()["rectified"] == "linear"
