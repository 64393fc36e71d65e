"""Numbers of the authors' programs. Tolerances are those at which the programs themselves repeat in float32."""

from __future__ import annotations

import pytest
import torch

from pathline import Flow, WeightsError, backbones, interpolants, objectives, solvers, weights
from pathline.plugins.deepflow.objective import later_times

LINEAR = interpolants.build("linear")
FORWARD = 2e-5
SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, num_heads=4, num_classes=10)


def assert_close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert float((ours.detach().double() - theirs.double()).abs().max()) <= tolerance


@pytest.fixture
def backbone(parity):
    def build(name):
        case = parity(name)
        options = dict(depth=case.description["config"]["depth"])
        if name.startswith("deepflow"):
            config = case.description["config"]
            options |= dict(cuts=tuple(config["df_idxs"]), acceleration_width=40, clamp_gap=config["legacy_scaling"])
            options |= dict(align_dims=config["z_dims"], align_width=40) if config["ssl_align"] else {}
        made = backbones.build("deepflow" if name.startswith("deepflow") else "sit", **SIZES, **options)
        made.load_state_dict(weights.convert(case.state, family="deepflow" if "deepflow" in name else "sit"))
        return made.requires_grad_(True)

    return build


@pytest.mark.parametrize("name", ["deepflow_3t", "deepflow_2t_ssl"])
def test_branches(name, parity, backbone):
    _, given, wanted, _ = parity(name)
    times = [given[key] for key in sorted(given) if key.startswith("t_")]
    made = backbone(name)
    out = made(given["x"], times[0], label=given["y"], branch_times=times[1:])
    assert len(out.velocities) == len(times) and len(out.accelerations) == len(times) - 1
    for i, velocity in enumerate(out.velocities):
        assert_close(velocity, wanted[f"velocity_{i}"], FORWARD)
    for i, acceleration in enumerate(out.accelerations):
        assert_close(acceleration, wanted[f"acceleration_{i}"], FORWARD)
    for i, features in enumerate(out.features):
        assert len(features) == (1 if "ssl" in name else 0)
        for feature in features:
            assert_close(feature, wanted[f"feature_{i}"], FORWARD)
    if "equal_times_velocity" in wanted:
        assert_close(made(given["x"], times[0], label=given["y"]), wanted["equal_times_velocity"], FORWARD)


def test_the_clamp_matters_where_the_case_says_so(parity, backbone):
    _, given, wanted, about = parity("deepflow_2t_ssl")
    made = backbone("deepflow_2t_ssl")
    made.refiners[0].gap_modulation.clamp = False
    out = made(given["x"], given["t_0"], label=given["y"], branch_times=(given["t_1"],))
    moved = float((out.velocities[1] - wanted["velocity_1"]).abs().max())
    assert moved == pytest.approx(about["sensitivity_max_abs_of_last_velocity"]["scale clamp switched off"], abs=1e-4)


LOSSES = [
    *[("deepflow_loss_uniform", v) for v in ("up_0.01", "down_0.01", "up_0.2", "down_0.2")],
    *[("deepflow_loss_lognormal", v) for v in ("up_0.01", "down_0.01", "up_0.2", "down_0.2")],
    *[("deepflow_loss_ssl", v) for v in ("up_0.01", "down_0.01")],
]


@pytest.mark.parametrize(("name", "variant"), LOSSES)
def test_objective_and_gradients(name, variant, parity, backbone):
    _, given, outputs, about = parity(name)
    wanted = {key.removeprefix(f"{variant}/"): value for key, value in outputs.items() if key.startswith(variant)}
    made = backbone(about["state_from"])
    features = tuple(given[key] for key in sorted(given) if key.startswith("zs_"))
    objective = objectives.build("deepflow", interpolant=LINEAR, acceleration=1.0, align=0.5 if features else 0.0)
    largest = about["variants"][variant]["tg_upper_bound"]
    gaps = [largest * given[f"U_{i}"] for i in range(1, about["branches"])]
    times = later_times(given["t_1"], gaps, up=about["variants"][variant]["sign"] == "+")
    assert_close(torch.stack(times), wanted["times"], 1e-7)
    x = LINEAR.interpolate(given["x_0"], given["noise"], times[0])
    assert_close(x, given["x_t1"], 1e-6)
    out = made(x, times[0], label=given["y"], branch_times=times[1:])
    terms = objective.terms(out, given["x_0"], given["noise"], times, features)
    assert_close(terms["deep"], wanted["denoising"], FORWARD)
    assert_close(terms["acceleration"], wanted["acceleration"], FORWARD)
    if features:
        assert_close(terms["align"].mean(), wanted["projection"].reshape(()), FORWARD)
    total = objective.combine(terms, {}).total
    assert_close(total.reshape(1), wanted["total"], FORWARD)
    total.backward()
    gradients = weights.convert({key: p.grad for key, p in made.named_parameters()}, to="deepflow")
    stored = {key.removeprefix("grad/"): value for key, value in wanted.items() if key.startswith("grad/")}
    assert len(stored) >= 9
    for key, gradient in stored.items():
        assert_close(gradients[key], gradient, FORWARD)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert float(norm) == pytest.approx(float(wanted["grad_norm"]), rel=5e-6)


def test_the_logit_normal_law(parity):
    """The base time of the program's "lognormal" weighting is the sigmoid of its normal draw."""
    _, given, _, _ = parity("deepflow_loss_lognormal")
    law = objectives.times.build("logit-normal")

    class Draw:
        def normal(self, stream):
            return given["normal_for_t_1"]

    assert_close(law.sample(Draw()), given["t_1"], 1e-7)


@pytest.mark.parametrize(("name", "tolerance"), [("sde_uncond", FORWARD), ("sde_cfg", 5e-5)])
def test_the_papers_sampler(name, tolerance, parity, backbone):
    _, given, wanted, about = parity(name)
    made = backbone(about["state_from"])
    rows = []
    made.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    flow = Flow(made, LINEAR)
    if about["cfg_scale"] != 1:
        interval = (about["guidance_low"], about["guidance_high"])
        guidance = solvers.guidance.build("classifier-free", scale=about["cfg_scale"], interval=interval, null=10)
        flow = guidance(flow)
    solver = solvers.build("euler-maruyama", steps=about["num_steps"])
    assert_close(torch.tensor(solver.times, dtype=torch.float64), given["t_grid"], 1e-15)
    solution = solver.solve(
        flow, given["latents"].double(), label=given["y"], increments=given["increments"], trajectory=True
    )
    assert solution.x.dtype == torch.float64
    assert_close(solution.x, wanted["samples"], tolerance)
    for i in range(3):
        assert_close(solution.trajectory[i + 1], wanted[f"x_step_{i}"], tolerance)
    assert rows == about["rows_per_call"] and solution.nfe == about["model_calls"]


@pytest.mark.parametrize("name", ["sit", "sit_sigma"])
def test_sit(name, parity, backbone):
    _, given, wanted, _ = parity(name)
    made = backbone(name)
    assert_close(made(given["x"], given["t"], label=given["y"]), wanted["prediction"], FORWARD)
    turned = weights.reverse_clock(made)
    assert_close(-turned(given["x"], 1 - given["t"], label=given["y"]), wanted["prediction"], FORWARD)
    assert (turned.num_classes, turned.null_label, turned.input_shape) == (10, 10, (4, 8, 8))
    doubled = wanted["without_cfg_doubled"]
    x, t = torch.cat((given["x"], given["x"])), torch.cat((given["t"], given["t"]))
    label = torch.cat((given["y"], torch.full_like(given["y"], 10)))
    assert_close(made(x, t, label=label), doubled, FORWARD)


@pytest.mark.parametrize("name", ["deepflow_3t", "deepflow_2t_ssl", "sit"])
def test_weights_return_to_the_byte(name, parity):
    state = parity(name).state
    family = "sit" if name == "sit" else "deepflow"
    returned = weights.convert(weights.convert(state), to=family)
    assert set(returned) == set(state)
    assert all(torch.equal(returned[key], value) and returned[key].dtype == value.dtype for key, value in state.items())


def test_sigma_channels_are_dropped(parity):
    state = parity("sit_sigma").state
    ours = weights.convert(state, family="sit")
    theirs = state["final_layer.linear.weight"].reshape(2, 2, 8, 48)
    assert torch.equal(ours["head.linear.weight"].reshape(2, 2, 4, 48), theirs[:, :, :4])


def test_unknown_layouts(parity):
    state = parity("deepflow_3t").state
    with pytest.raises(WeightsError, match="match no known family; name one of deepflow, sit"):
        weights.convert({"weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match="got keys that sit weights do not have: df_blocks"):
        weights.convert({k: v for k, v in state.items() if "df_blocks" in k}, family="sit")
    with pytest.raises(WeightsError, match="give the one that is not"):
        weights.convert(state, family="sit", to="deepflow")
    with pytest.raises(WeightsError, match=r"without what becomes head.linear.weight"):
        weights.convert({"x_embedder.proj.weight": torch.zeros(3, 2, 2, 2)}, family="sit")
    with pytest.raises(WeightsError, match="a head of 5 rows, expected 16 or twice as many"):
        broken = {**parity("sit").state, "final_layer.linear.weight": torch.zeros(5, 48)}
        weights.convert(broken, family="sit")
