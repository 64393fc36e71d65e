"""The chapters of a run's page, each of what lies in the run's folder; one of which there is nothing is empty."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pathline.core.errors import PathlineError
from pathline.metrics.results import Figure
from pathline.training.charts import chart
from pathline.training.curves import Numbers, panels_of, series
from pathline.training.log import mean_over_last_steps
from pathline.training.page import details, facts, note, picture, table
from pathline.training.remains import Run

__all__ = ["CHAPTERS", "model", "progress"]

SHOWN = 60  # rows of a table
TEXT = 30_000  # characters of a text
NONE = "—"
COUNTED = {"skipped steps": "skipped", "batches passed over by roll-backs": "passed", "failed saves": "failed_saves"}


def progress(run: Run) -> str:
    """Return how far the run is."""
    step = run.rows[-1]["step"] if run.rows else run.state.get("step", 0)
    return f"{step:,.0f} of {_number(_entry(run, 'train', 'steps'))} steps"


def model(run: Run) -> str:
    """Return what is trained on what."""
    names = [_entry(run, section, "name") for section in ("backbone", "objective", "data")]
    return f"{names[0]}, trained by {names[1]} on {names[2]}"


def _entry(run: Run, *path: str) -> Any:
    """Return an entry of the configuration, or a dash."""
    value: Any = run.configuration
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return NONE if value is None else value


def _number(value: Any, form: str = ",.0f") -> str:
    """Return a number as text; a dash for what is none, or not finite."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return format(value, form) if usable else NONE


def summary(run: Run) -> str:
    """Return the key facts."""
    told = {"steps": progress(run).removesuffix(" steps"), "model": str(_entry(run, "backbone", "name"))}
    told["parameters"] = _number(run.parameters)
    told |= {name: str(_entry(run, name, "name")) for name in ("objective", "interpolant", "data")}
    told["batch"] = _number(_entry(run, "train", "global_batch"))
    if run.rows:
        last = run.rows[-1]
        names = ["loss", *([run.state["window"]["plain"]] if run.state.get("window", {}).get("plain") in last else [])]
        for name in names:
            loss, steps = mean_over_last_steps(run.rows, name, 100)
            told[f"{name}, last {steps} steps"] = _number(loss, ".4f")
        told["images per second"] = _number(_median(run, "images_per_second"))
        told["skipped steps"] = _number(last.get("skipped"))
    else:
        told["log"] = "no row so far"
    return facts(told)


def _median(run: Run, name: str) -> float:
    values = _finite(series(run.rows, name))
    return float(np.median(values)) if len(values) else math.nan


def _finite(values: Numbers) -> Numbers:
    return values[np.isfinite(values)]


def curves(run: Run) -> str:
    """Return the curves of the log."""
    if not run.rows:
        return ""
    steps = series(run.rows, "step")
    drawn = "".join(chart(title, steps, lines) for title, lines in panels_of(run.rows).items())
    return f'<div class="charts">{drawn}</div>'


def samples(run: Run) -> str:
    """Return sheets of samples in the course of training."""
    shown, lost = [], []
    for path in run.sheets:
        try:
            sheet = run.sheet(path)
        except (OSError, ValueError) as error:
            lost.append(f"{path.name}: {error}")
            continue
        words = f"step {sheet.step:,}" + (", reduced" if sheet.reduced else "")
        shown.append(picture(sheet.content, sheet.kind, f"Sheet of samples drawn after {words}, a row a class", words))
    notes = note(f"Left out: {'; '.join(lost)}"[:500], alarm=True) if lost else ""
    return (f'<div class="pictures">{"".join(shown)}</div>' if shown else "") + notes


def evaluation(run: Run) -> str:
    """Return what was measured in the course of training, drawn and in a table."""
    rows, tracks = [], dict[str, dict[str, dict[float, float]]]()
    for entry in run.evaluations:
        metric, average = str(entry.get("metric", NONE)), str(entry.get("average", NONE))
        for name, figure in _figures(entry).items():
            rows.append((_number(entry.get("step")), average, metric, name, str(figure), _number(entry.get("count"))))
            track = tracks.setdefault(metric if name == metric else f"{metric}: {name}", {})
            track.setdefault(average, {})[float(entry.get("step", math.nan))] = figure.value
    drawn = "".join(_track(title, lines) for title, lines in tracks.items())
    head = ("step", "average", "metric", "figure", "value", "samples")
    told = table("Measured in the course of training, the newest first", head, rows[::-1][:SHOWN], numbers=(0, 4, 5))
    return (f'<div class="charts">{drawn}</div><p></p>' if drawn else "") + told + _more(len(rows))


def _figures(entry: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of a record; NaN for one that is none."""
    values, errors = (entry.get(name) or {} for name in ("values", "uncertainty"))
    return {
        str(name): Figure(math.nan if value is None else float(value), errors.get(name))
        for name, value in values.items()
    }


def _track(title: str, lines: Mapping[str, Mapping[float, float]]) -> str:
    """Draw a metric over training, if there are two steps of it or more."""
    steps = sorted({step for line in lines.values() for step in line if math.isfinite(step)})
    tracks = {name: np.array([line.get(step, math.nan) for step in steps]) for name, line in lines.items()}
    finite = {name: values for name, values in tracks.items() if len(_finite(values))}
    return chart(title, np.array(steps), finite) if len(steps) > 1 and finite else ""


def _more(count: int) -> str:
    return note(f"{count - SHOWN:,} more rows are not shown.") if count > SHOWN else ""


def results(run: Run) -> str:
    """Return the results of samples that lie in the folder."""
    parts = []
    for path in run.results[:SHOWN]:
        try:
            result = run.result(path)
        except PathlineError as error:
            parts.append(note(str(error)[:500], alarm=True))
            continue
        rows = []
        for record in result.records:
            for name, figure in _figures(record).items():
                real = _number(record.get("real", {}).get(name), ".4g")
                meaning = str(record.get("about", {}).get(name, ""))
                rows.append((record["metric"], name, str(figure), real, _number(record.get("count")), meaning))
        head = ("metric", "figure", "value", "real samples", "samples", "meaning")
        parts.append(table(path.name, head, rows[:SHOWN], numbers=(2, 3, 4)))
        warned = [str(words) for record in result.records for words in record.get("warnings", ())]
        parts += [note(words, alarm=True) for words in dict.fromkeys(warned)]
    return "".join(parts)


def speed(run: Run) -> str:
    """Return how fast it was."""
    names = {
        "images_per_second": ("images per second", ",.0f"),
        "data_wait_share": ("share of time waiting for data", ".1%"),
        "checkpoint_share": ("share of time waiting for checkpoints", ".1%"),
        "model_flops_utilisation": ("model FLOPs utilisation", ".1%"),
        "memory_gib": ("memory, GiB", ".2f"),
    }
    rows = []
    for name, (words, form) in names.items():
        values = _finite(series(run.rows, name))
        if len(values):
            ends = (np.median(values), values.min(), values.max(), values[-1])
            rows.append((words, *(format(float(value), form) for value in ends)))
    return table("Over the rows of the log", ("", "median", "least", "largest", "latest"), rows, numbers=(1, 2, 3, 4))


def skipped(run: Run) -> str:
    """Return what went wrong: steps that were skipped, batches passed over, saves that failed."""
    last = run.rows[-1] if run.rows else {}
    counts = {name: last.get(entry) or 0 for name, entry in COUNTED.items()}
    if not run.incidents and not any(counts.values()):
        return note("No step was skipped, and no save failed.") if run.rows else ""
    reasons = Counter(str(entry.get("reason")) for entry in run.incidents)
    told = {**{name: _number(count) for name, count in counts.items()}}
    told |= {f"skipped for: {reason}": f"{count:,}" for reason, count in reasons.most_common()}
    rows = []
    for entry in run.incidents[::-1][:SHOWN]:
        samples = entry.get("samples") or []
        more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
        named = ", ".join(map(str, samples[:8])) + more
        rows.append((_number(entry.get("step")), _number(entry.get("batch")), str(entry.get("reason")), named))
    head = ("step", "batch", "reason", "samples, by index")
    shown = table("Skipped steps, the newest first", head, rows, numbers=(0, 1))
    return facts(told) + "<p></p>" + shown + _more(len(run.incidents))


def lineage(run: Run) -> str:
    """Return what the run comes from, and what is left of it."""
    starts = [
        tuple(_cell(entry.get(name)) for name in ("time", "step", "checkpoint", "weights", "versions", "devices"))
        for entry in run.starts
    ]
    head = ("started", "after step", "from the checkpoint", "from the weights", "versions", "devices")
    state = run.state
    kept = [(path.name, f"{_size(path) / 2**20:,.1f}") for path in run.checkpoints[::-1][:SHOWN]]
    origins = {
        "Data": state.get("data"),
        "Statistics of the data": state.get("statistics"),
        "Autoencoder": (state.get("samples") or {}).get("latents_of") or run.configuration.get("autoencoder"),
        "Encoders": state.get("encoders"),
    }
    weights = _entry(run, "train", "initialize_from")
    return (
        ("" if starts or weights == NONE else note(f"Began with the weights of {weights}."))
        + table("Starts of the run", head, starts[-SHOWN:])
        + table("Checkpoints", ("name", "MiB"), kept, numbers=(1,))
        + "".join(details(title, _text(origin)) for title, origin in origins.items())
    )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {said}" for name, said in value.items())
    return NONE if value is None else str(value)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _text(value: Any) -> str:
    return _shortened(json.dumps(value, indent=1, ensure_ascii=False)) if value else ""


def configuration(run: Run) -> str:
    """Return the configuration."""
    return details("config.yaml", _shortened(run.text or _text(run.configuration)))


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]}\n… {len(text) - TEXT:,} more characters"


CHAPTERS: dict[str, Callable[[Run], str]] = {
    "Summary": summary,
    "Curves": curves,
    "Samples": samples,
    "Evaluation": evaluation,
    "Results": results,
    "Speed": speed,
    "Incidents": skipped,
    "Lineage": lineage,
    "Configuration": configuration,
}
