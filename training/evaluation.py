"""What a run draws with its averages while it trains: pictures, and samples that are measured.

N samples; P processes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import nn

from pathline import __version__
from pathline.core.errors import ConfigurationError, InputError, PathlineError
from pathline.core.sections import Sample
from pathline.metrics import Real, Record, Reference, features
from pathline.metrics.evaluation import Evaluation
from pathline.training import sampling
from pathline.training.log import Log, Rows, encoded, read_rows, tell, warn
from pathline.training.parts import Parts
from pathline.training.pictures import ROUNDING
from pathline.training.state import State

__all__ = ["Evaluations", "draw_picture", "is_picture_due"]

FILE = "evaluations.jsonl"
UNDRAWN = (PathlineError, OSError, MemoryError, torch.OutOfMemoryError)  # what ends a drawing, and not the run


def is_picture_due(parts: Parts, step: int, end: int) -> bool:
    """Whether samples are drawn after a step of a run that ends at another one."""
    every = parts.configuration.log.pictures_every
    return parts.can_draw and (step == end or (every is not None and step % every == 0))


def draw_picture(state: State, folder: Path) -> None:
    """Draw samples with an average, in all processes alike; the first writes them down. A failure is warned of."""
    first = state.fabric.is_global_zero
    with state.window.spending("other"):
        try:
            network = state.averages.network(state.parts.configuration.sample.average)
            drawn = sampling.draw_picture(state.parts, network)
            if first:
                sampling.save_picture(drawn, folder, state.step)
        except (PathlineError, OSError, torch.OutOfMemoryError) as error:
            if first:
                warn(f"no picture at step {state.step}: {error}")


class _Pending(NamedTuple):
    """Results on their way: of a step and an average, with what was drawn for them."""

    step: int
    average: str
    drawn: Mapping[str, Any]
    began: float
    records: Future[list[Record]]


class Evaluations:
    """Samples that are drawn on a schedule with averages of the weights, and measured.

    Every process draws and sees a share of the samples. What metrics have gathered goes to the first process, where a
    thread computes from it while training goes on. A failure is warned of and costs that evaluation alone. Networks
    that are cut up over processes draw all samples in each, as none can call its part alone.

    Args:
        state: of the run; what it draws with.

    Raises:
        ConfigurationError: metrics, a reference or samples that do not fit one another.
    """

    def __init__(self, state: State) -> None:
        self._state, self._settings = state, state.parts.configuration.evaluation
        s = self._settings
        self._wanted = Sample(count=s.count, labels=s.labels, seed=s.seed, batch=s.batch)
        self._averages = list(s.averages) or state.parts.configuration.ema.names[:1]
        self._template = None if s.every is None else _template(state)
        self._seen = False  # whether the reference is, which takes a pass over what is no statistics
        self._rows: Rows | None = None
        self._log: Log | None = None
        self._pending: list[_Pending] = []
        self._thread: ThreadPoolExecutor | None = None

    def open(self, folder: Path, log: Log) -> None:
        """Open ``evaluations.jsonl`` of a run's folder, lines of later steps set aside; in the first process alone."""
        if self._template is None and not (folder / FILE).exists():
            return
        self._rows, self._log = Rows(folder / FILE, self._state.step), log
        number = torch.get_num_threads()  # of the thread that asks: a new one has another
        self._thread = ThreadPoolExecutor(1, "evaluation", torch.set_num_threads, (number,))

    def is_due(self, end: int) -> bool:
        """Whether to evaluate now, in a run of that many steps."""
        step, every = self._state.step, self._settings.every
        return every is not None and step > 0 and (step % every == 0 or step == end)

    def run(self, folder: Path) -> None:
        """Draw and measure with each average that has no results of this step yet; every process must call this."""
        state = self._state
        with state.window.spending("other"):
            known = state.agreement.first(lambda: _averages_at(state.step, folder, self._pending))
            for average in self._averages:
                if average not in known:
                    self._evaluate(average)

    def poll(self) -> None:
        """Write down the results that are there."""
        while self._pending and self._pending[0].records.done():
            self._write(self._pending.pop(0))

    def rewind(self, step: int) -> None:
        """Go back to a step and set later results aside."""
        self._wait()
        if self._rows is not None:
            self._rows.rewind(step)

    def close(self) -> None:
        """Wait for what is being computed, and write it down."""
        self._wait()
        if self._thread is not None:
            self._thread.shutdown()
        if self._rows is not None:
            self._rows.close()
        self._rows = self._log = self._thread = None

    def _wait(self) -> None:
        while self._pending:
            self._write(self._pending.pop(0))

    def _evaluate(self, average: str) -> None:
        """Draw this process's share, and have the first one compute from all."""
        state, began, failed = self._state, time.perf_counter(), False
        self._wait()  # what waits holds features
        try:
            evaluation, nfe = self._drawn(state.averages.network(average))
            content = _packed(evaluation)
        except UNDRAWN as error:
            warn(f"no evaluation at step {state.step} of {average}: {error}")
            failed = True
        if state.agreement.largest(int(failed)):
            return
        others = self._gathered(content)
        if self._thread is not None:
            c = state.parts.configuration
            drawn = {"solver": c.solver, "guidance": c.guidance, "nfe": nfe, "seed": self._wanted.seed}
            law = self._wanted.labels if getattr(state.parts.backbone, "num_classes", 0) else None
            drawn |= {"label_law": law, "rounding": ROUNDING, "version": __version__}
            records = self._thread.submit(_computed, evaluation, others)
            self._pending.append(_Pending(state.step, average, drawn, began, records))
            if c.train.tf32 and (not self._seen or isinstance(evaluation.reference, Real)):
                self._wait()  # networks see a reference without TF32, which is a setting of all threads
            self._seen = True

    def _drawn(self, network: nn.Module) -> tuple[Evaluation, int]:
        """Draw a share of the samples and let metrics see it; return these, and a batch's network calls, the most."""
        parts, fabric, wanted, most = self._state.parts, self._state.fabric, self._wanted, 0
        cut_up = parts.configuration.train.strategy == "fsdp"
        share = range(wanted.count) if cut_up else _share(wanted.count, fabric.global_rank, fabric.world_size)
        classes, null = getattr(network, "num_classes", 0), getattr(network, "null_label", None)
        labels = sampling.labels_of(wanted, share, classes, null)
        assert self._template is not None  # a schedule has one
        evaluation, unseen = self._template.fresh(), None
        for ids, images, asked, nfe in sampling.batches(parts, network, labels, share, wanted.seed, wanted.batch):
            most = max(most, nfe)
            if unseen is None and (not cut_up or fabric.is_global_zero):
                try:
                    shown = None if wanted.labels == "none" else asked
                    evaluation.update(images, shown, torch.arange(ids.start, ids.stop))
                except Exception as error:  # of a metric, which may be anybody's; what is cut up is drawn to the end
                    unseen = error
        if unseen is not None:
            raise InputError(f"{type(unseen).__name__}: {unseen}") from unseen
        return evaluation, most

    def _gathered(self, content: bytes) -> list[bytes]:
        """Return what the metrics of the other processes hold, in the first one."""
        agreement = self._state.agreement
        if agreement.group is None:
            return []
        sizes = agreement.gather(torch.tensor([len(content)])).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in sizes] if self._state.fabric.is_global_zero else None
        dist.gather(padded, parts, dst=0, group=agreement.group)
        return [part[:size].numpy().tobytes() for part, size in zip(parts or (), sizes, strict=False)][1:]

    def _write(self, pending: _Pending) -> None:
        """Write a line a metric, and tell them on one."""
        step, average = pending.step, pending.average
        try:
            records = pending.records.result()
        except Exception as error:  # of a metric, which may be anybody's
            warn(f"no evaluation at step {step} of {average}: {type(error).__name__}: {error}")
            return
        if self._rows is None or self._log is None:
            return
        head = {"step": step, "average": average}
        self._rows.write(*(encoded({**head, **record.to_json(), **pending.drawn}) for record in records))
        self._log.show({"step": step, **_named(average, records)})
        seconds = time.perf_counter() - pending.began
        tell(f"step {step}, {average}: {_words(records)} ({self._wanted.count} samples, {seconds:.0f} s)")


def _template(state: State) -> Evaluation:
    """Build the metrics of a run, which are copied for every evaluation.

    Raises:
        ConfigurationError: they do not fit the data, or the reference.
    """
    c, parts = state.parts.configuration, state.parts
    s = c.evaluation
    if not parts.can_draw:
        raise ConfigurationError(
            "evaluation.every: got data that are no images, without an autoencoder to decode samples; set autoencoder, "
            "or leave it out"
        )
    try:
        for name in s.features:
            features.registry.entry(name)
        reference = _reference(parts)
        evaluation = Evaluation(s.metrics, reference, state.fabric.device, features=s.features)
        if reference is not None and parts.autoencoder is None:
            reference.check({"data": torch.zeros(1, *parts.dataset.shape)})
    except (PathlineError, OSError) as error:
        raise ConfigurationError(f"evaluation: {error}") from error
    return evaluation


def _reference(parts: Parts) -> Reference | None:
    """Return what samples are compared with; None where the data are latents and nothing is named."""
    c = parts.configuration
    if c.evaluation.reference is not None:
        return Reference.of(c.evaluation.reference)
    if not parts.dataset.data_are_images:
        return None
    return Reference.of({key: value for key, value in c.data.items() if key != "split"})


def _packed(evaluation: Evaluation) -> bytes:
    """Return what metrics hold, without pickling it.

    Raises:
        InputError: a metric cannot tell.
    """
    try:
        return save({name: tensor.contiguous() for name, tensor in evaluation.state().items()})
    except Exception as error:  # of a metric, which may be anybody's
        raise InputError(f"{type(error).__name__}: {error}") from error


def _share(count: int, rank: int, world_size: int) -> range:
    """Return the numbers of the samples that a process draws: as many in each, but for one."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def _averages_at(step: int, folder: Path, pending: list[_Pending]) -> list[str]:
    """Return the averages that have results of a step; none of a file that cannot be read."""
    rows: list[dict[str, Any]] = []
    with suppress(OSError):
        rows = [row for row in read_rows(folder, FILE) if row["step"] == step]
    return [str(row.get("average")) for row in rows] + [p.average for p in pending if p.step == step]


def _computed(evaluation: Evaluation, others: list[bytes]) -> list[Record]:
    """Return the records of all processes' samples; in a thread."""
    for content in others:
        evaluation.merge_state(load(content))
    return evaluation.compute()


def _named(average: str, records: list[Record]) -> dict[str, float]:
    """Return every value under a name for TensorBoard, as ``evaluation/ema/fid``."""
    named = {}
    for record in records:
        for name, value in record.values.items():
            words = [average, *record.metric.split(", "), *([] if name in record.metric.split(", ") else [name])]
            named["/".join(["evaluation", *(re.sub(r"[^\w.]+", "-", word) for word in words)])] = value
    return named


def _words(records: list[Record]) -> str:
    """Return values in a few words."""
    said = []
    for record in records:
        figures = (f"{'' if name in record.metric else f'{name} '}{value:.4g}" for name, value in record.values.items())
        said.append(f"{record.metric}: {', '.join(figures)}")
    return "; ".join(said)
