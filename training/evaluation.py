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
from safetensors.torch import load, save
from torch import nn

from pathline import __version__
from pathline.core.errors import InputError, PathlineError
from pathline.core.sections import Sample
from pathline.metrics import Real, Record
from pathline.metrics.evaluation import Evaluation
from pathline.training import sampling
from pathline.training.checkpoints import path_of
from pathline.training.log import Log, Rows, encoded, read_rows, tell, warn
from pathline.training.parts import Parts
from pathline.training.record import Order, digest
from pathline.training.shards import About
from pathline.training.state import State
from pathline.training.template import template
from pathline.training.trained import identity

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


class _Drawn(NamedTuple):
    """What is known of samples: network calls of a batch, the most of all, and the shape of an image."""

    nfe: int
    shape: tuple[int, ...]


class _Order(Order):
    """What is drawn with an average that may not be stored."""

    def _checkpoint(self) -> dict[str, Any]:
        settings, average = self.configuration.ema, str(self.configuration.sample.average)
        laws = [{"decay": settings.decay, "warmup": settings.warmup}] * (settings.decay is not None)
        laws += [{"length": length} for length in settings.lengths]
        return {"name": self.weights.name, "average": average, **dict(zip(settings.names, laws, strict=True))[average]}


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
        self._template = None if s.every is None else template(state)
        self._seen = False  # whether the reference is, which takes a pass over what is no statistics
        self._rows: Rows | None = None
        self._log: Log | None = None
        self._folder = Path()
        self._pending: list[_Pending] = []
        self._thread: ThreadPoolExecutor | None = None

    def open(self, folder: Path, log: Log) -> None:
        """Open ``evaluations.jsonl`` of a run's folder, lines of later steps set aside; in the first process alone."""
        if self._template is None and not (folder / FILE).exists():
            return
        self._rows, self._log, self._folder = Rows(folder / FILE, self._state.step), log, folder
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
            evaluation, told = self._drawn(state.averages.network(average))
            content = _packed(evaluation)
            drawn = self._told(average, told) if self._thread is not None else {}
        except UNDRAWN as error:
            warn(f"no evaluation at step {state.step} of {average}: {error}")
            failed = True
        if state.agreement.largest(int(failed)):
            return
        others = state.agreement.collect(content)[1:]
        if self._thread is not None:
            records = self._thread.submit(_computed, evaluation, others)
            self._pending.append(_Pending(state.step, average, drawn, began, records))
            if state.parts.configuration.train.tf32 and (not self._seen or isinstance(evaluation.reference, Real)):
                self._wait()  # networks see a reference without TF32, which is a setting of all threads
            self._seen = True

    def _drawn(self, network: nn.Module) -> tuple[Evaluation, _Drawn]:
        """Draw a share of the samples and let metrics see it; return these, and what is known of the samples."""
        parts, fabric, wanted, drawn = self._state.parts, self._state.fabric, self._wanted, _Drawn(0, ())
        cut_up = parts.configuration.train.strategy == "fsdp"
        share = range(wanted.count) if cut_up else _share(wanted.count, fabric.global_rank, fabric.world_size)
        classes, null = getattr(network, "num_classes", 0), getattr(network, "null_label", None)
        labels = sampling.labels_of(wanted, share, classes, null)
        assert self._template is not None  # a schedule has one
        evaluation, unseen = self._template.fresh(), None
        for ids, images, asked, nfe in sampling.batches(parts, network, labels, share, wanted.seed, wanted.batch):
            drawn = _Drawn(max(drawn.nfe, nfe), tuple(images.shape[1:]))
            if unseen is None and (not cut_up or fabric.is_global_zero):
                try:
                    shown = None if wanted.labels == "none" else asked
                    evaluation.update(images, shown, torch.arange(ids.start, ids.stop))
                except Exception as error:  # of a metric, which may be anybody's; what is cut up is drawn to the end
                    unseen = error
        if unseen is not None:
            raise InputError(f"{type(unseen).__name__}: {unseen}") from unseen
        return evaluation, drawn

    def _told(self, average: str, drawn: _Drawn) -> dict[str, Any]:
        """Return how samples were drawn, as sample.py tells it; fit for JSON."""
        state, c = self._state, self._state.parts.configuration
        wanted = self._wanted.model_copy(update={"average": average})
        order = _Order(
            c.model_copy(update={"sample": wanted}),
            state.parts,
            path_of(self._folder / "checkpoints", state.step),
            self._folder,
            __version__,
        )
        record = order.record(About(drawn.nfe, None, 0.0), state.fabric.world_size, state.fabric.device)
        left_out = ("block_evaluations", "seconds", "images_per_second_and_device", "configuration")
        told = {key: value for key, value in record.items() if key not in left_out}
        return {**told, "configuration_sha256": digest(c.model_dump(mode="json")), "shape": list(drawn.shape)}

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
        head = {"step": step, "average": average, **pending.drawn}
        with suppress(PathlineError, OSError):  # there is none of this step, or not yet
            hashed = identity(path_of(self._folder / "checkpoints", step), average)
            head["checkpoint"] = {**head["checkpoint"], "weights_sha256": hashed["weights_sha256"]}
        self._rows.write(*(encoded({**head, **record.to_json()}) for record in records))
        self._log.show({"step": step, **_named(average, records)})
        seconds = time.perf_counter() - pending.began
        tell(f"step {step}, {average}: {_words(records)} ({self._wanted.count} samples, {seconds:.0f} s)")


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
