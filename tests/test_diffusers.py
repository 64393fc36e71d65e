from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pathline import (
    Flow,
    InputError,
    InputTypeError,
    OpenEndError,
    SolverError,
    UnknownNameError,
    UnknownOptionError,
    backbones,
    interpolants,
    solvers,
)
from pathline.core.errors import MissingPackageError
from pathline.plugins import diffusers as plugin
from pathline.plugins.diffusers import scheduler

diffusers = pytest.importorskip("diffusers")
METHODS = ["euler", "heun", "euler-maruyama"]
TRAINED = 1000


@pytest.fixture(autouse=True)
def no_thread_is_left_behind(torchvision_operators):  # which pipelines import
    yield
    gc.collect()
    assert not threads()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "pathline-scheduler"]


def run(made, network, noise, generator=None):
    """What every pipeline does between its noise and its images."""
    sample = noise
    for timestep in made.timesteps:
        sample = made.step(network(sample, timestep), timestep, sample, generator=generator).prev_sample
    return sample


def exact(truth):
    """A network of diffusers' form: its time is the timestep."""
    return lambda sample, timestep: truth.velocity(sample, timestep / TRAINED)


class Unet(nn.Module):
    """The exact velocity of a Gaussian, as a pipeline's unet."""

    def __init__(self, truth) -> None:
        super().__init__()
        self.truth = truth
        self.config = SimpleNamespace(sample_size=(5, 7), in_channels=2)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, sample, timestep):
        return SimpleNamespace(sample=self.truth.velocity(sample, timestep / TRAINED))


def seed_of(generator):
    return int(torch.randint(2**62, (), generator=generator))


# ---- the result is that of our solver


def channels_first(images):
    """(N, C, H, W): older versions return (N, H, W, C) of numpy for any type of output but pictures."""
    return images if isinstance(images, torch.Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_a_pipeline_gives_what_our_solver_gives(gaussian, method, steps):
    """D7: one step among them."""
    truth = gaussian("linear", mean=0.1, std=0.2)
    pipeline = diffusers.DDPMPipeline(Unet(truth), scheduler(method))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=3, num_inference_steps=steps, generator=torch.Generator().manual_seed(5), output_type="pt"
    ).images
    images = channels_first(images)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(3, 2, 5, 7, generator=generator)
    ours = solvers.build(method, steps=steps)(truth.flow(), noise, seed=seed_of(generator))
    assert torch.isfinite(images).all()
    assert torch.allclose(images, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_with_a_real_network(method):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 8), norm_num_groups=2,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    pipeline = diffusers.DDPMPipeline(unet, scheduler(method))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(5), output_type="pt"
    ).images
    images = channels_first(images)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 1, 8, 8, generator=generator)
    flow = Flow(backbones.wrap(lambda x, t: unet(x, TRAINED * t).sample), interpolants.build("linear"))
    ours = solvers.build(method, steps=5)(flow, noise, seed=seed_of(generator))
    assert torch.allclose(images, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "score"])
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_every_prediction_on_every_path(gaussian, method, predicts, path):
    """From 0.9 to 0.1, where all kinds exist; against the same solver called directly, and the truth's transport."""
    truth = gaussian(path, mean=0.5, std=0.7)
    flow = truth.flow()

    def network(sample, timestep):
        prediction = flow(sample, torch.as_tensor(float(timestep) / TRAINED, dtype=torch.float64))
        return getattr(prediction, predicts)

    grid = {"grid": "uniform"} if method == "euler-maruyama" else {}
    made = scheduler(method, interpolant=path, predicts=predicts, start=0.9, end=0.1, **grid)
    made.set_timesteps(64)
    noise = torch.randn(3, 5, dtype=torch.float64)
    got = run(made, network, noise, torch.Generator().manual_seed(2))
    seed = seed_of(torch.Generator().manual_seed(2))
    ours = solvers.build(method, steps=64, start=0.9, end=0.1, **grid)(flow, noise, seed=seed)
    assert torch.allclose(got, ours, rtol=0, atol=1e-6)
    if method == "heun":
        assert torch.allclose(got, truth.transported(noise, 0.9, 0.1), atol=1e-3)


@given(steps=st.integers(1, 40), count=st.integers(1, 5))
def test_any_number_of_steps_and_samples(gaussian, steps, count):
    truth = gaussian("linear", mean=-1.0, std=0.3)
    made = scheduler("heun")
    made.set_timesteps(steps)
    noise = torch.randn(count, 3, 2)
    ours = solvers.build("heun", steps=steps)(truth.flow(), noise)
    assert torch.allclose(run(made, exact(truth), noise), ours, rtol=0, atol=1e-6)


def test_the_distribution_of_an_sde_is_the_data(gaussian):
    """D10, D11: noise drawn on the way keeps mean and spread; diffusers' churn and resampling do not."""
    truth = gaussian("linear", mean=2.0, std=0.5)
    made = scheduler("euler-maruyama", last_step="tweedie", grid="uniform")
    made.set_timesteps(100)
    samples = run(made, exact(truth), torch.randn(4000, 3), torch.Generator().manual_seed(3))
    assert float(samples.mean()) == pytest.approx(2.0, abs=0.03)
    assert float(samples.std()) == pytest.approx(0.5, abs=0.02)


# ---- timesteps, steps, configuration


def test_timesteps_are_the_times_of_the_network_calls():
    made = scheduler("heun")
    made.set_timesteps(4)
    assert made.timesteps.tolist() == [1000, 750, 750, 500, 500, 250, 250, 0]
    assert made.timesteps.dtype == torch.float32
    assert made.order == 2 and made.num_inference_steps == 4 and made.init_noise_sigma == 1 and len(made) == 1000
    made = scheduler("euler-maruyama", grid={"name": "paper", "last": 0.2}, num_train_timesteps=10)
    made.set_timesteps(5)
    assert made.timesteps.tolist() == pytest.approx([10, 8, 6, 4, 2]) and len(made) == 10
    sample = torch.randn(2, 3)
    assert made.scale_model_input(sample, 3) is sample


def test_the_grid_is_a_function_of_its_options_alone():
    """D1, D2, D12: no shift or grid is applied twice, in constructor, configuration or by a second call."""
    made = scheduler("euler-maruyama", grid={"name": "paper", "last": 0.1})
    made.set_timesteps(6)
    first = made.timesteps.clone()
    made.set_timesteps(3)
    made.set_timesteps(6)
    again = type(made).from_config(made.config)
    again.set_timesteps(6)
    truth = TRAINED * torch.linspace(1, 0.1, 6)
    for timesteps in (first, made.timesteps, again.timesteps):
        assert torch.allclose(timesteps, truth)
    made.config["solver"]["grid"] = "uniform"  # a copy: what was built stays
    made.set_timesteps(6)
    assert torch.allclose(made.timesteps, truth)


def test_configurations_are_saved_and_loaded(tmp_path):
    made = scheduler(
        {"name": "heun", "start": 0.75}, interpolant={"name": "vp", "beta_max": 12.0}, predicts="noise", end=0.1
    )
    made.save_pretrained(tmp_path)
    loaded = plugin.FlowScheduler.from_pretrained(tmp_path)
    assert loaded.config.solver == {"name": "heun", "start": 0.75, "end": 0.1}
    assert loaded.config.interpolant == {"name": "vp", "beta_max": 12.0}
    assert loaded.config.predicts == "noise" and loaded.config.num_train_timesteps == 1000
    loaded.set_timesteps(3)
    made.set_timesteps(3)
    assert torch.equal(loaded.timesteps, made.timesteps)
    assert isinstance(loaded, diffusers.SchedulerMixin) and type(loaded) is type(made)
    assert copy.deepcopy(made).config == made.config
    with pytest.raises(AttributeError, match="Nothing"):
        plugin.Nothing  # noqa: B018 - the attribute is what is asked for


def test_a_saved_pipeline_is_loaded(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, scheduler("heun")).save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.solver == {"name": "heun"}


# ---- noising by time


@given(timestep=st.one_of(st.integers(0, 1000), st.floats(0, 1000)))
def test_noise_is_added_by_time_not_by_table(timestep):
    """D3: any timestep, whole or not; D5: whatever step the solve has come to."""
    made = scheduler("euler")
    made.set_timesteps(3)
    data, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    for _ in range(2):
        t = timestep / 1000
        got = made.add_noise(data, noise, torch.tensor([timestep] * 4, dtype=torch.float64))
        assert torch.allclose(got, (1 - t) * data + t * noise, rtol=0, atol=1e-12)
        assert torch.equal(made.scale_noise(data, torch.tensor([timestep], dtype=torch.float64), noise), got)
        if made._position == 0:
            made.step(torch.zeros(4, 3), made.timesteps[0], torch.randn(4, 3))


def test_every_whole_timestep_has_its_noise():
    made = scheduler("euler", interpolant="trigonometric")
    t = torch.arange(1001)
    data, noise = torch.randn(2, 1001, 3)
    angle = (math.pi / 2000 * t.double())[:, None]
    assert torch.allclose(made.add_noise(data, noise, t), (angle.cos() * data + angle.sin() * noise).float(), atol=1e-6)


def test_half_precision_keeps_neighbouring_times_apart():
    """D6: coefficients in float32 for bf16 samples; the state between steps in float32 too."""
    made = scheduler("euler")
    ones, t = torch.ones(4, 3, dtype=torch.bfloat16), torch.tensor([10.0, 9.0, 8.0, 7.0])
    got = made.add_noise(0 * ones, ones, t)
    assert got.dtype == torch.bfloat16 and len(set(got[:, 0].tolist())) == 4
    made.set_timesteps(512)
    sample = torch.ones(2, 3, dtype=torch.bfloat16)
    got = run(made, lambda x, t: torch.full_like(x, 0.5), sample)  # 512 steps of 1/1024: each rounds away in bf16
    assert got.dtype == torch.bfloat16 and torch.equal(got, torch.full_like(got, 0.5))


def test_noise_that_does_not_fit_is_refused():
    made = scheduler("euler")
    data = torch.randn(4, 3)
    for timestep in (-1, 1001, math.nan):
        with pytest.raises(InputError, match="expected times"):
            made.add_noise(data, data, timestep)
    with pytest.raises(InputError, match="shape"):
        made.add_noise(data, data, torch.rand(3))
    with pytest.raises(InputError, match="shape"):
        made.scale_noise(data, torch.tensor(1.0), data[:, :2])


# ---- what a step refuses


def test_a_step_checks_its_timestep():
    """D4: another timestep than the next is refused, and the solve goes on with the right one."""
    made = scheduler("euler")
    made.set_timesteps(4)
    sample, output = torch.randn(3, 2), torch.randn(3, 2)
    for wrong in (750, 1.0, math.nan, torch.tensor(0.0)):
        with pytest.raises(InputError, match=r"timestep .*expected 1000"):
            made.step(output, wrong, sample)
    after = made.step(output, 1000, sample).prev_sample
    assert torch.allclose(after, sample - output / 4)
    with pytest.raises(InputError, match="got timestep 1000, expected 750"):
        made.step(output, 1000, after)
    with pytest.raises(InputError, match=r"shape \(2,\)"):
        made.step(output, torch.tensor([750.0, 750.0]), after)
    assert torch.allclose(made.step(output, made.timesteps[1], after, return_dict=False)[0], sample - output / 2)


def test_steps_end_with_the_timesteps(gaussian):
    """D4: re-use needs set_timesteps."""
    made = scheduler("heun")
    sample = torch.randn(3, 2)
    with pytest.raises(InputError, match="before set_timesteps"):
        made.step(sample, 1000, sample)
    made.set_timesteps(2)
    first = run(made, exact(gaussian("linear")), sample)
    with pytest.raises(InputError, match="after the last of 4 timesteps"):
        made.step(sample, 1000, sample)
    made.set_timesteps(2)
    assert torch.equal(run(made, exact(gaussian("linear")), sample), first)


def test_a_changed_sample_is_refused():
    made = scheduler("heun")
    made.set_timesteps(2)
    sample = torch.randn(3, 2)
    after = made.step(sample, 1000, sample).prev_sample
    with pytest.raises(InputError, match="did not return"):
        made.step(sample, 500, after + 1)
    made.step(sample, 500, after.clone())


def test_what_is_returned_stays_as_it_is():
    """The solver works in place, in a tensor of its own."""
    made = scheduler("euler")
    made.set_timesteps(3)
    noise = torch.randn(3, 2)
    kept, sample, seen = noise.clone(), noise, []
    for timestep in made.timesteps:
        sample = made.step(torch.ones(3, 2), timestep, sample).prev_sample
        seen.append((sample, sample.clone()))
    assert torch.equal(noise, kept) and all(torch.equal(one, copied) for one, copied in seen)


def test_outputs_that_do_not_fit_are_refused():
    made = scheduler("euler")
    made.set_timesteps(2)
    sample = torch.randn(3, 2)
    with pytest.raises(InputError, match="model output of shape"):
        made.step(torch.randn(3, 4), 1000, sample)
    with pytest.raises(InputError, match="NaN"):
        made.step(sample, 1000, sample * math.nan)
    for pair in ((sample, sample.long()), (sample.long(), sample), (None, sample)):
        with pytest.raises(InputTypeError, match="floating-point"):
            made.step(pair[0], 1000, pair[1])
    with pytest.raises(TypeError, match="s_churn"):  # D9
        made.step(sample, 1000, sample, s_churn=1.0)
    assert torch.allclose(run(made, lambda x, t: torch.ones_like(x), sample), sample - 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_gives_nan_is_found(method):
    made = scheduler(method)
    made.set_timesteps(4)
    bad = made.timesteps[2]
    with pytest.raises(SolverError) as caught:
        run(made, lambda x, t: x / (0 if t == bad else 1) * (0 if t == bad else 1), torch.randn(3, 2))
    first = made.timesteps.tolist().index(float(bad))
    assert caught.value.nfe == first + 1 and caught.value.step == first // made.order
    assert caught.value.t == pytest.approx(float(bad) / TRAINED)
    with pytest.raises(InputError, match="set_timesteps"):
        made.step(torch.randn(3, 2), 1000, torch.randn(3, 2))


def test_generators():
    made = scheduler("euler-maruyama")
    noise = torch.randn(3, 2)

    def sampled(generator):
        made.set_timesteps(5)
        return run(made, lambda x, t: torch.zeros_like(x), noise, generator)

    assert torch.equal(sampled(torch.Generator().manual_seed(1)), sampled(torch.Generator().manual_seed(1)))
    assert not torch.equal(sampled(torch.Generator().manual_seed(1)), sampled(torch.Generator().manual_seed(2)))
    torch.manual_seed(7)
    first = sampled(None)
    torch.manual_seed(7)
    assert torch.equal(sampled(None), first)
    with pytest.raises(InputTypeError, match="got a list for a generator"):
        sampled([torch.Generator()] * 3)
    ode, generator = scheduler("euler"), torch.Generator().manual_seed(4)
    ode.set_timesteps(2)
    state = generator.get_state()
    run(ode, lambda x, t: x, noise, generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_gradient_mode(mode):
    """S13: no graph in the result."""
    network = nn.Linear(3, 3)
    made = scheduler("heun")
    made.set_timesteps(2)
    with mode():
        got = run(made, lambda x, t: network(x), torch.randn(2, 3))
    assert not got.requires_grad and torch.isfinite(got).all()


# ---- what the factory refuses


def test_wrong_options_are_refused():
    for wrong, error, message in (
        (lambda: scheduler("heunn"), UnknownNameError, "did you mean 'heun'"),
        (lambda: scheduler("heun", s_churn=1.0), UnknownOptionError, "no option 's_churn'"),  # D9
        (lambda: scheduler("heun", shift=3.0), UnknownOptionError, "no option 'shift'"),
        (lambda: scheduler("heun", start=2.0), InputError, "start"),
        (lambda: scheduler("heun", steps=4), InputError, "leave it out"),
        (lambda: scheduler("heun", interpolant="lineer"), UnknownNameError, "linear"),
        (lambda: scheduler("heun", interpolant=interpolants.build("linear")), InputTypeError, "for interpolant"),
        (lambda: scheduler(solvers.build("heun", steps=3)), InputTypeError, "for solver"),
        (lambda: scheduler("heun", grid=solvers.grids.build("uniform")), InputTypeError, "for solver"),
        (lambda: scheduler("heun", predicts="x0"), UnknownNameError, "unknown prediction"),
        (lambda: scheduler("heun", num_train_timesteps=0), InputError, "num_train_timesteps 0"),
        (lambda: scheduler({"start": 0.5}), UnknownOptionError, "without a name"),
        (lambda: scheduler("heun").set_timesteps(0), InputError, "steps 0"),
        (lambda: scheduler("heun", predicts="data").set_timesteps(3), OpenEndError, "evaluates t = 0"),
    ):
        with pytest.raises(error, match=message):
            wrong()


def test_the_missing_library_is_named(monkeypatch):
    plugin._scheduler_class.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_utils", None)
    with pytest.raises(MissingPackageError, match=r"pathline\[diffusers\]"):
        scheduler("euler")


# ---- threads


def begun(**options):
    made = scheduler("heun", **options)
    made.set_timesteps(3)
    noise = torch.randn(2, 3)
    made.step(noise, 1000, noise)
    return made


def test_the_thread_ends_with_the_solve(gaussian):
    made = begun()
    assert len(threads()) == 1
    made.set_timesteps(2)
    assert not threads()
    run(made, exact(gaussian("linear")), torch.randn(2, 3))
    assert not threads()


def test_the_thread_ends_when_the_scheduler_is_dropped():
    made = begun()
    del made
    assert not threads()
    made = begun()
    made.itself = made  # a cycle: the collector's work
    del made
    gc.collect()
    assert not threads()


def test_the_thread_ends_on_an_error():
    made = begun()
    made._solve.answer("neither a tensor nor a stop")  # an error of the solver's own, in its thread
    with pytest.raises(AttributeError, match="shape"):
        made._solve.receive()
    assert not threads()
    made.set_timesteps(1)
    assert not threads()
    noise = torch.randn(2, 3)
    with pytest.raises(InputError):
        made.step(noise, 1000, noise * math.inf)
    assert not threads()


def test_many_schedulers_side_by_side(gaussian):
    truth = gaussian("linear", mean=1.0, std=0.4)
    schedulers = [scheduler("heun") for _ in range(5)]
    noises = [torch.randn(2, 3) for _ in schedulers]
    for made in schedulers:
        made.set_timesteps(4)
    samples = list(noises)
    for timestep in schedulers[0].timesteps:
        for number, made in enumerate(schedulers):
            output = truth.velocity(samples[number], timestep / TRAINED)
            samples[number] = made.step(output, timestep, samples[number]).prev_sample
    for noise, sample in zip(noises, samples, strict=True):
        assert torch.allclose(sample, solvers.build("heun", steps=4)(truth.flow(), noise), rtol=0, atol=1e-6)


def test_a_program_ends_with_a_solve_under_way():
    program = (
        "import torch\n"
        "from pathline.plugins.diffusers import scheduler\n"
        "made = scheduler('heun'); made.set_timesteps(3); noise = torch.randn(2, 3)\n"
        "made.step(noise, 1000, noise); print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "done" and "Traceback" not in done.stderr


class Restless(solvers.Euler):
    """Calls the network again, or not at all, as the velocity says: the times cannot be announced."""

    def step(self, run, x, number, t, t_next):
        if float(run.predict(x, t).velocity.sum()) > 0:
            run.predict(x, t)
        return x


class Adaptive(solvers.Solver):
    """A solver that has steps, but chooses its times."""

    order, calls_per_step, evaluates_end = 1, 1, False

    def __init__(self, steps: int) -> None:
        super().__init__()

    def integrate(self, run, x):
        return x


def test_solvers_whose_times_depend_on_the_network_are_refused(monkeypatch):
    monkeypatch.setattr(plugin.solvers, "build", lambda spec: Restless(spec["steps"]))
    made = scheduler("restless")
    made.set_timesteps(2)
    with pytest.raises(SolverError, match="at the times announced"):
        run(made, lambda x, t: torch.ones_like(x), torch.randn(2, 3))
    assert not threads()
    monkeypatch.setattr(plugin.solvers, "build", lambda spec: Adaptive(spec["steps"]))
    with pytest.raises(InputTypeError, match="chooses its times itself"):
        scheduler("adaptive")
