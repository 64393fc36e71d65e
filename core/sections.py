"""The sections of a configuration that name no component: optimizer, averages, guard, training, log, and so on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator

__all__ = ["Checkpoint", "Ema", "Evaluation", "Guard", "Log", "Optim", "Sample", "Section", "Train"]

Positive = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**64, strict=True)]
Number = Annotated[float, Field(strict=True)]  # true and false are none
Above0 = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Below1 = Annotated[Number, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _expecting(words: str) -> WrapValidator:
    """One message in the place of one for each type that a value may have."""

    def checked(value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError(f"expected {words}") from None

    return WrapValidator(checked)


class Section(BaseModel):
    """A section; entries that it does not have are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Optim(Section):
    """The optimizer. Defaults are those of the DeepFlow paper: AdamW, a constant 1e-4, no decay, clipping at 1.

    ``muon`` orthogonalises the updates of the matrices of the blocks (torch.optim.Muon, its update scaled to the size
    of AdamW's, so that ``lr`` serves both) and leaves the other parameters to AdamW. ``decay`` tells what
    ``weight_decay`` shrinks: ``matrices`` spares biases, gains and embedding tables, ``all`` spares nothing.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Above0 = 1e-4
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    eps: Above0 = 1e-8
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    decay: Literal["matrices", "all"] = "matrices"
    muon_momentum: Below1 = 0.95
    warmup_steps: Natural = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr_fraction: Fraction = 0.0
    clip: Above0 | None = 1.0


class Ema(Section):
    """Averages of the weights, one or several at once.

    ``decay`` gives the average ``ema``, of decay min(decay, (1 + i)/(10 + i)) at update i, or constant without
    ``warmup``; None leaves it out. Each of ``lengths``, relative widths σ from 0.01 to 0.28, gives a power-function
    average (EDM2, arXiv:2312.02696) named after it, as ``ema-0.050``; with ``snapshot_every`` these are stored in the
    run's folder every so many steps, so that other lengths can be had after training.
    """

    decay: Below1 | None = 0.9999
    warmup: bool = True
    lengths: tuple[Annotated[Number, Field(ge=0.01, le=0.28)], ...] = ()
    snapshot_every: Positive | None = None

    @property
    def names(self) -> list[str]:
        """Names of the averages, that of ``decay`` first."""
        return ["ema"] * (self.decay is not None) + [f"ema-{length:.3f}" for length in self.lengths]


class Guard(Section):
    """What is done about numbers that are not finite, and about jumps of the loss.

    A step is skipped whose data, loss or gradient are not finite, or whose loss exceeds the running mean by ``spike``
    times the running mean of its size, both over about 100 steps, and not before as many were taken; None skips no
    jump. After ``rollback_after`` skipped steps in a row training goes back to the newest checkpoint before them, and
    on with the samples after them; after ``max_rollbacks`` of these it stops.
    """

    spike: Annotated[Above0, Field(le=1e6)] | None = 10.0
    rollback_after: Positive = 20
    max_rollbacks: Natural = 3


Recomputed = Annotated[
    Literal["none", "selective"] | Positive, _expecting("none, selective, or a whole number from 1 on")
]


class Train(Section):
    """Length, folder and scale; ``global_batch`` is over all devices, ``micro_batch`` what one takes at once.

    ``strategy``: ``ddp`` keeps the network on every device, ``fsdp`` cuts it up over them (FSDP2); ``auto`` is ``ddp``.
    ``activation_checkpointing``: a number k computes every k-th block a second time in the backward pass instead of
    keeping its activations; ``selective`` keeps results of matrix products and attention alone. ``compile`` compiles
    block by block. ``tf32`` lets products of float32 matrices run in it. ``timeout``: seconds that processes wait for
    one another. Python's garbage is collected every ``collect_garbage_every`` steps, on all devices at once.
    """

    steps: Positive
    folder: Text
    stop_at: Positive | None = None
    seed: Seed = 0
    global_batch: Positive = 256
    micro_batch: Positive | None = None
    threads: Annotated[Positive, Field(le=1024)] | None = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = False
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: Positive = 1
    num_nodes: Positive = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    activation_checkpointing: Recomputed = "none"
    compile: bool = False
    timeout: Annotated[Number, Field(ge=1, le=1e6)] = 600.0
    collect_garbage_every: Positive = 1000
    initialize_from: Text | None = None


class Log(Section):
    """How often, in steps, a row is written and a picture drawn (None: at the end alone).

    A row gives the loss over ``time_bins`` equal bins of t; 0 leaves it out. Rows go to ``metrics.jsonl``, to
    TensorBoard where it is installed unless ``tensorboard`` is false, and to Weights & Biases, under the project that
    ``wandb`` names.
    """

    every: Positive = 100
    pictures_every: Positive | None = None
    time_bins: Annotated[Natural, Field(le=1000)] = 10
    tensorboard: bool = True
    wandb: Text | None = None


class Checkpoint(Section):
    """How often, in steps, a checkpoint is written, and which are kept: the newest ``keep``, and every ``keep_every``.

    ``asynchronous``: written beside training, from a copy on the host that is as large as the checkpoint.
    """

    every: Positive = 1000
    keep: Positive = 3
    keep_every: Positive | None = None
    asynchronous: bool = True


Labels = Annotated[
    Literal["balanced", "random", "none"] | Natural | Annotated[list[Natural], Field(min_length=1)],
    _expecting("balanced, random, none, a class, or a list of classes"),
]


class Sample(Section):
    """What ``sample.py`` draws; labels are balanced (i mod classes), random, none (the null label), or given.

    ``average`` names the average of the weights to draw with, as ``ema`` or ``ema-0.050``; None is the first. ``batch``
    samples are solved at once, and ``decode_batch`` latents decoded. More than ``shard`` samples, or those of several
    ``devices``, are drawn in shards of that many, from which a killed drawing goes on; ``shards`` says whether they are
    joined in the end, or kept.
    """

    count: Positive = 100
    labels: Labels = "balanced"
    seed: Seed = 0
    batch: Positive = 250
    decode_batch: Positive = 32
    devices: Positive = 1
    shard: Positive = 1000
    shards: Literal["join", "keep"] = "join"
    output: Text | None = None
    average: Text | None = None


MetricSpec = Annotated[
    Text | Annotated[dict[str, Any], Field(min_length=1)],
    _expecting("a name, as fid or fd:MODEL, or {name: …, options}"),
]


class Evaluation(Section):
    """What is drawn and measured in training ``every`` so many steps, and at its end; None draws nothing.

    ``count`` samples by the run's solver and guidance, ``labels``, ``seed`` and ``batch`` as of ``sample``, are drawn
    with each of ``averages``, or with the first one. ``metrics`` and ``reference`` are those of ``evaluate.py``;
    without a reference samples are compared with the run's own data, their held-out half where they have one.
    ``features`` holds options of feature spaces, as ``{inception: {weights: FILE}}``.
    """

    every: Positive | None = None
    count: Annotated[int, Field(ge=2, strict=True)] = 1000
    metrics: tuple[MetricSpec, ...] = ("frechet",)
    reference: Text | None = None
    features: dict[str, dict[str, Any]] = Field(default_factory=dict)
    averages: tuple[Text, ...] = ()
    labels: Labels = "balanced"
    seed: Seed = 0
    batch: Positive = 250
