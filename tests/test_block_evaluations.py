"""Transformer blocks run by a solve, beside its network calls: against hooks on the blocks themselves."""

from __future__ import annotations

import json

import pytest
import torch

from pathline import Flow, backbones, interpolants, objectives, solvers
from pathline.core.composed import Rescheduled, SplitFlow
from pathline.sample import main as sample
from pathline.solvers import guidance
from pathline.train import main as train

LINEAR = interpolants.build("linear")
TOY = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=8, num_heads=2, num_classes=7)
LABEL = torch.tensor([1, 4])
UNGAPPED = ("mean-flow", "taylor")  # need a network of another kind
STEPS = {"ode": dict(method="heun3", steps=3), "dopri5": {}, "sde": dict(steps=3), "exponential": dict(steps=3)}


@pytest.fixture
def noise():
    return 0.3 * torch.randn(2, 3, 4, 4)


def count_blocks(backbone):
    """Return a list that grows by one with every block of the trunk that runs."""
    ran = []
    for block in getattr(backbone, "trunk", backbone).blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    return ran


def network(depth=3, seed=0, **options):
    torch.manual_seed(seed)
    backbone = backbones.build("sit", **TOY, depth=depth, **options)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.1)
    return backbone, count_blocks(backbone)


@pytest.mark.parametrize("name", [name for name in solvers.names() if name not in UNGAPPED])
def test_every_solver_counts_the_blocks_that_ran(name, noise):
    backbone, ran = network()
    solver = solvers.build(name, **STEPS.get(name, dict(steps=3)))
    solution = solver.solve(Flow(backbone, LINEAR), noise, seed=1, label=LABEL)
    assert solution.block_evaluations == len(ran) == 3 * solution.nfe > 0


def test_a_flow_counts_over_solves_and_a_solution_its_own(noise):
    backbone, ran = network(depth=5)
    flow = Flow(backbone, LINEAR)
    bound, euler = flow.given(label=LABEL), solvers.build("euler", steps=2)
    assert (flow.block_evaluations, flow.depth) == (0, 5)
    assert [euler.solve(bound, noise).block_evaluations for _ in range(2)] == [10, 10]
    assert flow.block_evaluations == bound.block_evaluations == len(ran) == 20


@pytest.mark.parametrize("name", ["classifier-free", "cfg-zero", "apg"])
def test_a_doubled_batch_counts_once(name, noise):
    backbone, ran = network()
    flow = guidance.build(name, scale=2.0, interval=(0.0, 0.6))(Flow(backbone, LINEAR))
    solution = solvers.build("midpoint", steps=5).solve(flow, noise, label=LABEL)
    assert solution.block_evaluations == len(ran) == 3 * 10 and solution.nfe == 10


def test_a_weaker_networks_blocks_count_where_it_is_called(noise):
    (strong, ran), (weak, also) = network(depth=5), network(depth=2, seed=1)
    guide = guidance.build("autoguidance", weak=weak, scale=2.0, interval=(0.3, 0.7))
    twice = guidance.build("classifier-free", scale=1.5)(guide(Flow(strong, LINEAR)))
    solution = solvers.build("euler", steps=10).solve(twice, noise, label=LABEL)
    assert (len(ran), len(also)) == (10 * 5, 5 * 2)  # 0.7, 0.6, 0.5, 0.4 and 0.3 lie inside
    assert solution.block_evaluations == 60 and solution.nfe == 15


def test_a_network_that_is_its_own_weaker_one_is_not_counted_twice(noise):
    backbone, ran = network()
    flow = Flow(backbone, LINEAR)
    guided = guidance.build("autoguidance", weak=flow.given(label=torch.tensor([7, 7])), scale=2.0)(flow)
    solution = solvers.build("euler", steps=4).solve(guided, noise, label=LABEL)
    assert solution.block_evaluations == len(ran) == 24 and solution.nfe == 8


def test_flows_made_of_others(noise):
    backbone, ran = network()
    rescheduled = Rescheduled(Flow(backbone, LINEAR), interpolants.build("trigonometric"))
    solution = solvers.build("euler", steps=4).solve(rescheduled, noise, label=LABEL)
    assert solution.block_evaluations == len(ran) == 12
    (drift, ran), (latent, also) = network(depth=5), network(depth=2)
    split = SplitFlow(drift, latent, interpolants.build("stochastic")).given(label=LABEL)
    solution = solvers.build("euler", steps=3, start=0.9, end=0.1).solve(split, noise)
    assert solution.block_evaluations == len(ran) + len(also) == 3 * 7 and solution.nfe == 6


def test_networks_that_do_not_tell(noise):
    """A network of any form, one with another ``depth``, and one beside that tells."""
    silent = backbones.wrap(lambda x, t, **_: 0 * x, num_classes=7, null_label=7)
    euler = solvers.build("euler", steps=2)
    assert euler.solve(Flow(silent, LINEAR), noise, label=LABEL).block_evaluations is None
    backbone, _ = network()
    backbone.depth = "three"
    assert Flow(backbone, LINEAR).block_evaluations is None
    told, _ = network()
    guided = guidance.build("autoguidance", weak=silent, scale=2.0)(Flow(told, LINEAR))
    assert euler.solve(guided, noise, label=LABEL).block_evaluations is None
    path = interpolants.build("stochastic")
    split = SplitFlow(told, silent, path)
    assert split.block_evaluations is None and Rescheduled(Flow(silent, LINEAR), LINEAR).block_evaluations is None


def test_mean_flows_step_is_counted(noise):
    backbone, ran = network(takes_gap=True)
    solution = solvers.build("mean-flow", steps=2).solve(Flow(backbone, LINEAR), noise, label=LABEL)
    assert solution.block_evaluations == len(ran) == 6


def test_a_branched_backbone_counts_its_trunk_alone(noise):
    """All blocks of all branches; the VeRA blocks between them are not transformer blocks of the trunk."""
    backbone = backbones.build("deepflow", **TOY, depth=5, cuts=(2,), acceleration_width=6)
    ran = count_blocks(backbone)
    solution = solvers.build("heun", steps=3).solve(Flow(backbone, LINEAR), noise, label=LABEL)
    assert solution.block_evaluations == len(ran) == 6 * 5
    assert objectives.build("deepflow", interpolant=LINEAR)(backbone, noise, label=LABEL).total.isfinite()


def test_a_drawing_tells_them_and_has_a_name_of_its_own(tmp_path, capsys):
    """Three steps of Euler: two blocks a call, or one of an exit, or 1 + 2 + 2 where it switches."""
    backbone = {"name": "deepflow", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8, "depth": 2}
    backbone |= {"num_heads": 2, "num_classes": 10, "acceleration_width": 3}
    train_section = {"steps": 1, "global_batch": 2, "folder": str(tmp_path / "run"), "accelerator": "cpu"}
    sections = {"data": "digits", "backbone": backbone, "objective": "deepflow", "train": train_section}
    sections |= {"solver": {"name": "euler", "steps": 3}, "sample": {"count": 5}}
    (tmp_path / "c.yaml").write_text(json.dumps(sections))
    assert train([str(tmp_path / "c.yaml")]) == 0
    words = (
        "guidance=[]",
        "guidance=[{name: branch, branch: 1}]",
        "guidance=[{name: branch, schedule: [[1, 1], [0.7, 2]]}]",
    )
    for word, blocks in zip(words, (6, 3, 5), strict=True):
        assert sample([str(tmp_path / "run"), word]) == 0
        assert f"NFE 3, {blocks} transformer blocks each" in capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("samples-*.json")]
    assert sorted(record["block_evaluations"] for record in records) == [3, 5, 6]
