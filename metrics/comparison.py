"""Several results in one table, with what sets them apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from pathline.metrics.results import Column, Result

__all__ = ["differences", "markdown", "table"]


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
    """Return short names of the results; longer ones where two would be called alike."""
    short = [result.name for result in results]
    return [result.full_name if short.count(result.name) > 1 else result.name for result in results]


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


def _content(record: Mapping[str, Any]) -> Any:
    """Return what a record was compared with: where its hash is known, it matters no longer where it lay."""
    reference = record.get("reference")
    if not isinstance(reference, dict) or "sha256" not in reference:
        return reference
    return {key: value for key, value in reference.items() if key not in ("path", "file")}


OF_A_METRIC: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "number of samples": lambda record: record.get("count"),
    "reference": _content,
    "number of real samples": lambda record: record.get("real_count"),
    "feature space": lambda record: record.get("features"),
}


def differences(results: Sequence[Result]) -> list[str]:
    """Tell what sets results apart: first what makes figures not comparable, then what was drawn differently."""
    names = _names(results)
    lines = [f"nothing is known of how {name} was drawn" for name, r in zip(names, results, strict=True) if not r.drawn]
    for name, result in zip(names, results, strict=True):
        lines += [f"{name}: {rec['metric']}: {words}" for rec in result.records for words in rec.get("warnings", ())]
    for metric in dict.fromkeys(record["metric"] for result in results for record in result.records):
        found = [(n, rec) for n, r in zip(names, results, strict=True) for rec in r.records if rec["metric"] == metric]
        for what, read in OF_A_METRIC.items():
            lines += _told(f"{metric} is not comparable: another {what}", [(n, read(rec)) for n, rec in found])
    for head, facts in (("not comparable: another", BROKEN), ("drawn differently: another", DIFFERENT)):
        for what, fact in facts.items():
            lines += _told(f"{head} {what}", [(n, fact(result)) for n, result in zip(names, results, strict=True)])
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
