"""The parts that a configuration names, built and checked against one another before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from pathline import backbones, interpolants, objectives, solvers
from pathline import data as datasets
from pathline.core.config import Configuration
from pathline.core.draws import Draws
from pathline.core.errors import ConfigurationError, InputError, PathlineError
from pathline.core.flow import BaseFlow, Flow
from pathline.data import Batch, Dataset
from pathline.encoders import Source, autoencoders, on_grid
from pathline.encoders.autoencoders import Autoencoder
from pathline.interpolants import Interpolant
from pathline.objectives import Objective
from pathline.solvers import Solver, guidance
from pathline.solvers.guidance import Guidance, LabelGuidance, PairGuidance
from pathline.training.alignment import blank_features, encoder_problems, source_of, token_grid
from pathline.training.latents import autoencoder_problems
from pathline.training.network import checkpoint_activations, units
from pathline.training.optim import matrices_of_blocks
from pathline.training.speed import forward_flops

__all__ = ["Parts", "build"]

T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """Everything that a configuration names.

    Attributes:
        forward_flops: floating-point operations of the objective's forward pass on one sample, those of encoders
            left out; 0 if the parts are not for training.
        encoders: where the tokens to align to come from, in the order of the backbone's ``align_dims``.
        autoencoder: that decodes samples; None where the data are pixels, or latents that stay latents.
    """

    configuration: Configuration
    dataset: Dataset
    interpolant: Interpolant
    backbone: nn.Module
    objective: Objective
    solver: Solver
    guidance: tuple[Guidance, ...]
    forward_flops: int = 0
    encoders: tuple[Source, ...] = ()
    autoencoder: Autoencoder | None = None

    @property
    def can_draw(self) -> bool:
        """Whether samples can be seen: ``images`` gives some."""
        return self.autoencoder is not None or (self.dataset.data_are_images and self.dataset.shape[0] in (1, 3))

    def images(self, x: Tensor) -> Tensor | None:
        """Return the images of samples (N, C, H, W): decoded latents, or the samples, where the data are images.

        The autoencoder moves to where the samples are.

        Returns:
            (N, c, R, R) in [−1, 1], not clamped; None for latents without an autoencoder, and for data of other
            channels than one or three.
        """
        if self.autoencoder is not None:
            return self.autoencoder.to(x.device).decode(x)
        return x if self.can_draw else None

    def features(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tokens of every encoder on the backbone's token grid, (N, T, dim) each, on a device."""
        wanted = token_grid(self.backbone)
        found = [(source.tokens(batch, device), source.grid) for source in self.encoders]
        return tuple(on_grid(tokens, grid, wanted or grid) for tokens, grid in found)

    def conditions(self, label: Tensor | None) -> dict[str, Any]:
        """Return what the backbone is conditioned on: the labels, unless it is unconditional."""
        return {"label": label} if getattr(self.backbone, "num_classes", 0) else {}

    def flow(self, backbone: nn.Module) -> BaseFlow:
        """Return the guided flow of a backbone, this one's or its average."""
        flow: BaseFlow = Flow(backbone, self.interpolant, self.objective.predicts)  # type: ignore[arg-type]  # checked there
        for guide in self.guidance:
            flow = guide(flow)
        return flow


def build(
    configuration: Configuration, *, training: bool = True, data: Dataset | None = None, like: Parts | None = None
) -> Parts:
    """Build every part; the backbone's first weights are a function of ``train.seed``.

    Args:
        configuration: of a run.
        training: whether the loss will be evaluated; else encoders are left out, for samples need none.
        data: in the place of the data set that the configuration names; sampling takes what is ``Described``.
        like: parts whose path, network, objective and autoencoder are taken, since the configuration names the same.

    Raises:
        ConfigurationError: options that a part refuses, or parts that do not fit one another; lists all of them.
    """
    c, problems = configuration, _Problems()
    dataset = problems.collect("data", lambda: datasets.build(c.data)) if data is None else data
    interpolant: Any = (
        like.interpolant if like else problems.collect("interpolant", lambda: interpolants.build(c.interpolant))
    )
    backbone = like.backbone if like else problems.collect("backbone", lambda: _backbone(c))
    # an objective is built on the path: without one there is nothing more to say
    objective: Any = interpolant and (
        like.objective
        if like
        else problems.collect("objective", lambda: objectives.build(c.objective, interpolant=interpolant))
    )
    solver = problems.collect("solver", lambda: solvers.build(c.solver))
    guides = [
        problems.collect(f"guidance.{i}", lambda item=item: guidance.build(item))  # type: ignore[misc]  # a default
        for i, item in enumerate(c.guidance)
    ]
    sources = [
        problems.collect(f"encoders.{i}", lambda item=item: source_of(item, dataset))  # type: ignore[misc]  # a default
        for i, item in enumerate(c.encoders if training and dataset else ())
    ]
    named = c.autoencoder
    autoencoder = like.autoencoder if like else None
    if named is not None and like is None:
        autoencoder = problems.collect("autoencoder", lambda: autoencoders.build(named))
    problems.report()
    parts = Parts(
        c,
        dataset,
        interpolant,
        backbone,
        objective,
        solver,
        tuple(guides),
        encoders=tuple(sources),
        autoencoder=autoencoder,
    )
    flops = _cross_check(parts, problems, training=training)
    problems.report()
    return replace(parts, forward_flops=flops)


def _backbone(configuration: Configuration) -> nn.Module:
    """Build the backbone; torch's own generator is left as it was."""
    seed = Draws(configuration.train.seed).torch_seed("weights")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return backbones.build(configuration.backbone)


class _Problems:
    """Collects what goes wrong, by section."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def collect(self, section: str, make: Callable[[], T]) -> T:
        """Return what ``make`` returns; an error is noted, and nothing may be used before ``report``."""
        try:
            return make()
        except PathlineError as error:
            self.found.append(f"{section}: {error}")
            return None  # type: ignore[return-value]

    def report(self) -> None:
        if self.found:
            one = len(self.found) == 1
            head = f"{len(self.found)} configuration {'entry that does' if one else 'entries that do'} not fit:"
            lines = [head, *self.found]
            raise ConfigurationError("\n  ".join(lines))


def _cross_check(parts: Parts, problems: _Problems, *, training: bool) -> int:
    """Note what does not fit; return the operations of the objective's forward pass on one sample, if it is called."""
    backbone, dataset = parts.backbone, parts.dataset
    shape, classes = getattr(backbone, "input_shape", None), getattr(backbone, "num_classes", 0)
    if shape is not None and tuple(shape) != tuple(dataset.shape):
        problems.found.append(
            f"backbone: takes inputs of shape {tuple(shape)}, and the data have {tuple(dataset.shape)} (C, H, W); "
            "set input_size and in_channels to the data's"
        )
    if classes not in (0, dataset.num_classes):
        problems.found.append(
            f"backbone.num_classes: got {classes}, and the data have {dataset.num_classes} classes; use that, or 0"
        )
    if classes and parts.objective.label_dropout and getattr(backbone, "null_label", None) is None:
        problems.found.append(
            f"objective.label_dropout: got {parts.objective.label_dropout} for a backbone without a null label; use 0"
        )
    by_label = any(isinstance(guide, LabelGuidance) for guide in parts.guidance)
    if by_label and (not classes or getattr(backbone, "null_label", None) is None):
        problems.found.append("guidance: needs a backbone with classes and a null label; leave guidance out")
    problems.found += _missing_blocks(parts)
    problems.found += _random_layers(backbone)
    problems.found += _label_problems(parts, training)
    problems.found += _scale_problems(parts, training)
    if parts.autoencoder is not None:
        problems.found += autoencoder_problems(parts.autoencoder, dataset)
    if training:
        name = parts.configuration.objective["name"]
        problems.found += encoder_problems(parts.encoders, parts.objective, name, backbone)
        problems.found += _precision_problems(parts)
    if problems.found:
        return 0
    flow = problems.collect("guidance", lambda: parts.flow(backbone))
    if flow is not None:
        problems.collect("solver", lambda: _check_solver(parts, flow))
    return 0 if not training else problems.collect("objective", lambda: _check_objective(parts))


def _label_problems(parts: Parts, training: bool) -> Iterator[str]:
    """Yield what is wrong with labels that samples are to be drawn with."""
    c, classes = parts.configuration, getattr(parts.backbone, "num_classes", 0)
    asked = [("sample", c.sample.labels)]
    if training and c.evaluation.every is not None:
        asked.append(("evaluation", c.evaluation.labels))
    for name, labels in asked:
        if isinstance(labels, str):
            if labels == "none" and classes and getattr(parts.backbone, "null_label", None) is None:
                yield f"{name}.labels: got none for a backbone without a null label; name a law, or classes"
        elif not classes:
            yield f"{name}.labels: got {labels} for a backbone without classes; leave it out"
        elif max([labels] if isinstance(labels, int) else labels) >= classes:
            yield f"{name}.labels: got {labels}, expected classes from 0 to {classes - 1}"


def _scale_problems(parts: Parts, training: bool) -> Iterator[str]:
    """Yield what is wrong with one guidance scale a sample: training draws other numbers of them."""
    count = parts.configuration.sample.count
    for number, guide in enumerate(parts.guidance):
        scale = guide.scale if isinstance(guide, PairGuidance) else 1.0
        if isinstance(scale, Tensor) and (training or len(scale) != count):
            wanted = "for a run" if training else f"for sample.count {count}, or one for each"
            yield f"guidance.{number}.scale: got {len(scale)} scales, expected one {wanted}"


def _missing_blocks(parts: Parts) -> Iterator[str]:
    """Yield what is wrong with entries that ask for blocks of a backbone without any."""
    c, backbone = parts.configuration, parts.backbone
    given = {"activation_checkpointing": c.train.activation_checkpointing != "none", "compile": c.train.compile}
    if not units(backbone):
        for name in (name for name, wanted in given.items() if wanted):
            value, kind = getattr(c.train, name), type(backbone).__name__
            yield f"train.{name}: got {value} for a {kind} without blocks in a ModuleList; leave it out"
    if c.optim.name == "muon" and not matrices_of_blocks(backbone):
        yield f"optim.name: got muon for a {type(backbone).__name__} without a weight of nn.Linear in blocks; use adamw"


def _random_layers(backbone: nn.Module) -> Iterator[str]:
    """Yield what is wrong with layers that draw at random: no resume could repeat what they draw."""
    for name, module in backbone.named_modules():
        if isinstance(module, _DropoutNd) and module.p:
            yield (
                f"backbone: draws at random in {name} ({type(module).__name__}, p = {module.p:g}), which no resume "
                "repeats; set p to 0: labels are dropped by the objective"
            )


def _precision_problems(parts: Parts) -> Iterator[str]:
    """Yield what is wrong with a precision in which the differences that an objective takes are rounded away."""
    train = parts.configuration.train
    given = f"train.precision {train.precision}" if train.precision != "fp32" else "train.tf32" if train.tf32 else None
    if given and getattr(parts.objective, "takes_differences", False):
        yield (
            f"objective: divides small differences of the network's outputs, which {given} does not resolve; let it "
            "take its exact derivative (jvp), or use train.precision=fp32 without train.tf32"
        )


def _check_objective(parts: Parts) -> int:
    """Evaluate the loss of two samples: only that tells whether objective and backbone speak to one another.

    With several devices also its gradient: data parallelism waits for every parameter's. With recomputed activations,
    too: forward-mode differentiation cannot pass them. Returns the operations of the forward pass on one sample.
    """
    train, batch = parts.configuration.train, parts.dataset.batch([0, 1])
    features = blank_features(parts.encoders, parts.backbone, 2)  # an encoder may be larger than the network

    def loss(backbone: nn.Module = parts.backbone) -> Tensor:
        given = parts.conditions(batch["label"])
        return parts.objective(backbone, batch["data"], Draws(0).at(range(2)), features=features, **given).total

    flops = forward_flops(loss) // 2
    if train.activation_checkpointing != "none":
        again = deepcopy(parts.backbone)
        checkpoint_activations(again, train.activation_checkpointing)
        try:
            loss(again).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        except RuntimeError as error:
            raise InputError(
                "cannot be differentiated through blocks that compute their activations again, as none can be that "
                f"differentiates forward; leave train.activation_checkpointing out ({str(error).splitlines()[0]})"
            ) from error
    if train.devices * train.num_nodes > 1:
        loss().backward()  # type: ignore[no-untyped-call]  # torch has no types here
        unused = [name for name, p in parts.backbone.named_parameters() if p.requires_grad and p.grad is None]
        parts.backbone.zero_grad()
        if unused:
            raise InputError(
                f"gives no gradient to {', '.join(unused[:3])} and so on ({len(unused)} parameters), for which several "
                "devices would wait; use an objective and a backbone that belong together, or one device"
            )
    return flops


def _check_solver(parts: Parts, flow: BaseFlow) -> None:
    """Check that the path has what the solver asks for, with no network call."""
    x: Any = torch.zeros(1, *parts.dataset.shape)
    parts.solver.check(flow, x, None)
