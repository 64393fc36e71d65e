"""Results as files: what was measured, of what and how; several in one table, with what sets them apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pathline.core.errors import DataError

__all__ = ["Figure", "Result", "differences", "markdown", "output_of", "table", "write"]

FORMAT = 2  # 1 told neither reference, features nor uncertainties
ENDING = ".metrics.json"


class Figure(NamedTuple):
    """A value and its uncertainty, None where none is known."""

    value: float
    uncertainty: float | None

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.uncertainty is None else f"{self.value:.4g} ± {self.uncertainty:.2g}"


Column = tuple[str, str]
"""A metric and the name of one of its values."""


@dataclass(frozen=True)
class Result:
    """A file of results.

    Attributes:
        path: of the file.
        drawn: how the samples were drawn, as their record tells; empty if nobody wrote one.
        shape: of a sample, (C, H, W); None in files of format 1.
        records: one a metric, as ``Record.to_json`` gives them.
    """

    path: Path
    drawn: Mapping[str, Any]
    shape: tuple[int, ...] | None
    records: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a file that ``write`` wrote.

        Raises:
            DataError: no such file, or another kind of one; it is named.
        """
        if not path.is_file():
            raise DataError(f"got no file at {path}, expected results that evaluate.py wrote, *{ENDING}")
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise DataError(f"got {path}, which is no JSON: {error}") from error
        known = isinstance(content, dict) and content.get("format", 1) in range(1, FORMAT + 1)
        records = content.get("metrics") if known else None
        drawn = content.get("samples", {}) if known else None
        if not isinstance(records, list) or not isinstance(drawn, dict) or not all(map(_is_record, records)):
            raise DataError(f"got {path}, which holds no results of format 1 to {FORMAT}, as evaluate.py writes them")
        return cls(path, drawn, tuple(content.get("shape") or ()) or None, tuple(records))

    @property
    def figures(self) -> dict[Column, Figure]:
        """Every value by metric and name."""
        return {
            (record["metric"], name): Figure(value, record.get("uncertainty", {}).get(name))
            for record in self.records
            for name, value in record["values"].items()
        }


def output_of(path: Path) -> Path:
    """Return where the results of samples go: ``<samples>.metrics.json`` beside the file, its shards or the folder."""
    if path.is_dir() and path.suffix != ".shards":
        path = path.resolve()  # of "." the name
        return path.with_name(path.name + ENDING)
    return path.with_suffix(ENDING)


def write(
    path: Path, records: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any], version: str, **more: Any
) -> None:
    """Write results.

    Args:
        path: of the file, as ``output_of`` names it.
        records: what came out, one a metric, as ``Record.to_json`` gives them.
        drawn: how the samples were drawn.
        version: of pathline.
        more: what else is known of the samples, as ``shape``.
    """
    head = {"format": FORMAT, "version": version, "torch": torch.__version__}
    path.write_text(json.dumps({**head, **more, "metrics": list(records), "samples": dict(drawn)}, indent=1))


def _is_record(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
        return False
    tables = (entry.get("values"), entry.get("uncertainty", {}))
    return all(isinstance(t, dict) and all(isinstance(value, Real) for value in t.values()) for t in tables)


# --- tables ----------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """Lay results out as lines, one a result under its metrics, whose names are broken into lines."""
    columns = _columns(results)
    heads = [["result"], ["solver"], ["NFE"], *(_words(column) for column in columns)]
    height = max(map(len, heads))
    rows = [*zip(*([""] * (height - len(head)) + head for head in heads), strict=True), *_rows(results, columns)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows
    )


def markdown(results: Sequence[Result]) -> str:
    """Lay results out as a table of Markdown."""
    columns = _columns(results)
    heads = ["result", "solver", "NFE", *(", ".join(_words(column)) for column in columns)]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *_rows(results, columns)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _columns(results: Sequence[Result]) -> list[Column]:
    return list(dict.fromkeys(column for result in results for column in result.figures))


def _words(column: Column) -> list[str]:
    """Return a column's name in parts: the metric's, and the value's where it says more."""
    metric, name = column
    parts = metric.split(", ")
    return parts if name in parts else [*parts, name]


def _rows(results: Sequence[Result], columns: Sequence[Column]) -> Iterator[list[str]]:
    for name, result in zip(_names(results), results, strict=True):
        figures = result.figures
        solver, nfe = _solver(result), result.drawn.get("nfe")
        cells = ["—" if cell is None else str(cell) for cell in (solver, nfe, *(figures.get(c) for c in columns))]
        yield [name, *cells]


def _names(results: Sequence[Result]) -> list[str]:
    """Return short names of the files; longer ones where two would be called alike."""
    short = [result.path.name.removesuffix(ENDING) for result in results]
    long = [str(result.path).removesuffix(ENDING) for result in results]
    return [full if short.count(name) > 1 else name for name, full in zip(short, long, strict=True)]


def _solver(result: Result) -> str | None:
    solver = result.drawn.get("solver")
    name = solver.get("name") if isinstance(solver, dict) else solver
    return None if name is None else str(name)


# --- what sets results apart -----------------------------------------------------------------------------------------


def _entry(*path: str) -> Callable[[Result], Any]:
    """Return what reads an entry of how samples were drawn; None where it is missing."""

    def read(result: Result) -> Any:
        value: Any = result.drawn
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return read


def _weights(result: Result) -> Any:
    checkpoint = result.drawn.get("checkpoint")
    found = checkpoint if isinstance(checkpoint, dict) else {}
    return found.get("weights_sha256", found.get("sha256", checkpoint))


def _decoder(result: Result) -> Any:
    decoder = result.drawn.get("autoencoder")
    return decoder if decoder or not result.drawn else "none"  # samples that are pixels need none


# with another one of these, figures cannot be held against each other
BROKEN: dict[str, Callable[[Result], Any]] = {
    "shape of a sample": lambda result: result.shape,
    "label law": _entry("label_law"),
    "rounding": _entry("rounding"),
    "decoder": _decoder,
}
# these may be what is compared: they are told, so that nothing else is taken for the cause
DIFFERENT: dict[str, Callable[[Result], Any]] = {
    "checkpoint": _weights,
    "average of the weights": _entry("checkpoint", "average"),
    "solver": _entry("solver"),
    "NFE": _entry("nfe"),
    "guidance": _entry("guidance"),
    "precision": _entry("precision"),
    "TF32": _entry("tf32"),
    "seed law": _entry("seed_law"),
}
OF_A_METRIC = {
    "number of samples": "count",
    "reference": "reference",
    "number of real samples": "real_count",
    "feature space": "features",
}


def differences(results: Sequence[Result]) -> list[str]:
    """Tell what sets results apart: first what makes figures not comparable, then what was drawn differently."""
    names = _names(results)
    lines = [f"nothing is known of how {name} was drawn" for name, r in zip(names, results, strict=True) if not r.drawn]
    for name, result in zip(names, results, strict=True):
        lines += [f"{name}: {rec['metric']}: {words}" for rec in result.records for words in rec.get("warnings", ())]
    for metric in dict.fromkeys(record["metric"] for result in results for record in result.records):
        found = [(n, rec) for n, r in zip(names, results, strict=True) for rec in r.records if rec["metric"] == metric]
        for what, key in OF_A_METRIC.items():
            lines += _told(f"{metric} is not comparable: another {what}", [(n, rec.get(key)) for n, rec in found])
    for head, facts in (("not comparable: another", BROKEN), ("drawn differently: another", DIFFERENT)):
        for what, read in facts.items():
            lines += _told(f"{head} {what}", [(n, read(result)) for n, result in zip(names, results, strict=True)])
    return list(dict.fromkeys(lines))


def _told(head: str, values: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """Yield one line if the values are not all the same: each with the results that have it."""
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, value in values:
        groups.setdefault(json.dumps(value, sort_keys=True), (value, []))[1].append(name)
    if len(groups) > 1:
        found = [value for value, _ in groups.values()]
        alike = {key for key, value in _items(found[0]) if all((key, value) in _items(other) for other in found)}
        told = (f"{_shown(value, alike)} in {', '.join(names)}" for value, names in groups.values())
        yield f"{head}: {'; '.join(told)}"


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _shown(value: Any, alike: Collection[str] = ()) -> str:
    """Return a value in few words: hashes by their first digits, of tables the name and what is not alike."""
    if value in (None, {}, []):
        return "none" if value == [] else "unknown"
    if isinstance(value, dict):
        others = (f"{key}={_shown(item)}" for key, item in value.items() if key != "name" and key not in alike)
        return " ".join([*([str(value["name"])] if "name" in value else ()), *others]) or "the rest"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)
