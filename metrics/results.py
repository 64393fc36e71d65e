"""Results as files: what was measured, of what and how."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pathline.core.errors import DataError
from pathline.metrics.base import Record

__all__ = ["Figure", "Result", "add", "output_of", "read", "write"]

FORMAT = 2  # 1 told neither reference, features nor uncertainties
ENDING = ".metrics.json"
LINES = ".jsonl"  # ends the name of a file that training writes
_OWN = {"format", "version", "torch", "metrics", "samples", "asked"}  # the last of a sweep, of what it asked alone
_RECORD = {field.name for field in fields(Record)}


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
    """Results of samples, or of a model.

    Attributes:
        path: of the file.
        drawn: how the samples were drawn, as their record tells; empty if nobody wrote one.
        shape: of a sample, (C, H, W); None in files of format 1.
        records: one a metric, as ``Record.to_json`` gives them.
        part: which of several in the file.
    """

    path: Path
    drawn: Mapping[str, Any]
    shape: tuple[int, ...] | None
    records: tuple[Mapping[str, Any], ...]
    part: str = ""

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a file that ``write`` wrote.

        Raises:
            DataError: no such file, or another kind of one; it is named.
        """
        try:
            content = json.loads(_text(path))
        except (ValueError, RecursionError) as error:
            raise DataError(f"got {path}, which is no JSON: {error}") from error
        known = isinstance(content, dict) and content.get("format", 1) in range(1, FORMAT + 1)
        records, drawn = (content.get("metrics"), content.get("samples", {})) if known else (None, None)
        shape = (content.get("shape") or []) if known else None
        if not isinstance(records, list) or not isinstance(drawn, dict) or not all(map(_is_record, records)):
            raise DataError(f"got {path}, which holds no results of format 1 to {FORMAT}, as evaluate.py writes them")
        if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
            raise DataError(f"got {path} with samples of shape {shape}, expected [C, H, W]")
        return cls(path, drawn, tuple(shape) or None, tuple(records))

    @property
    def name(self) -> str:
        """Of the file, or of the run, and which part."""
        name = self.path.parent.resolve().name if self.path.suffix == LINES else self.path.name.removesuffix(ENDING)
        return f"{name} {self.part}".rstrip()

    @property
    def full_name(self) -> str:
        """The same with its folder."""
        name = self.path.parent if self.path.suffix == LINES else str(self.path).removesuffix(ENDING)
        return f"{name} {self.part}".rstrip()

    @property
    def figures(self) -> dict[Column, Figure]:
        """Every value by metric and name."""
        return {
            (record["metric"], name): Figure(value, (record.get("uncertainty") or {}).get(name))
            for record in self.records
            for name, value in record["values"].items()
        }

    def by_count(self) -> list[Result]:
        """Return a result for each number of samples, where one metric is of several; else this one."""
        metrics = [record["metric"] for record in self.records]
        if len(metrics) == len(set(metrics)):
            return [self]
        counts = dict.fromkeys(record.get("count") for record in self.records)
        return [
            replace(self, part=f"({count})", records=tuple(r for r in self.records if r.get("count") == count))
            for count in counts
        ]


def read(place: str) -> list[Result]:
    """Read results by their place.

    Args:
        place: a file that evaluate.py wrote; or ``RUN/evaluations.jsonl``, all that was measured while it trained, or
            ``RUN/evaluations.jsonl:STEP`` or ``…:STEP:AVERAGE``.

    Returns:
        One for each number of samples, step and average.

    Raises:
        DataError: nothing there, or another kind of file; it is named.
    """
    path, found, chosen = place.partition(f"{LINES}:")
    if not found and not place.endswith(LINES):
        return Result.read(Path(place)).by_count()
    step, _, average = chosen.partition(":")
    results = _of_lines(Path(path + LINES) if found else Path(place))
    matching = [result for (at, name), result in results.items() if step in ("", at) and average in ("", name)]
    if not matching:
        there = ", ".join(f"{at}:{name}" for at, name in list(results)[-5:]) or "none"
        raise DataError(f"got no results at {place}, expected one of those there: {there}")
    return matching


def _of_lines(path: Path) -> dict[tuple[str, str], Result]:
    """Return what was measured in training, by step and average; a last line that was cut short is left out."""
    results: dict[tuple[str, str], Result] = {}
    lines = _text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"got {path}, whose line {number} is no JSON: {error}") from error
        if isinstance(row, dict) and isinstance(row.get("values"), dict):  # what was not finite is null
            row["values"] = {name: math.nan if value is None else value for name, value in row["values"].items()}
        if not _is_record(row) or not isinstance(row.get("shape", []), list):
            raise DataError(f"got {path}, whose line {number} holds no results, as training writes them")
        record = {key: value for key, value in row.items() if key in _RECORD}
        drawn = {key: value for key, value in row.items() if key not in _RECORD | {"step", "average", "shape"}}
        place = (str(row.get("step")), str(row.get("average")))
        older = results.get(place, Result(path, drawn, tuple(row.get("shape", ())) or None, (), "{}:{}".format(*place)))
        results[place] = replace(older, records=(*older.records, record))
    return results


def _text(path: Path) -> str:
    """Return the text of a file; raises DataError where there is none."""
    if not path.is_file():
        raise DataError(f"got no file at {path}, expected results that evaluate.py wrote, *{ENDING}")
    try:
        return path.read_text()
    except ValueError as error:
        raise DataError(f"got {path}, which is no text: {error}") from error


def _is_record(entry: Any) -> bool:
    """Whether an entry is a record, as far as tables and comparisons read it."""
    if not isinstance(entry, dict):
        return False
    if not isinstance(entry.get("metric"), str) or not isinstance(entry.get("count", 0), int):
        return False
    tables, warned = (entry.get("values"), entry.get("uncertainty") or {}), entry.get("warnings") or []
    numbers = all(isinstance(t, dict) and all(map(_is_number, t.values())) for t in tables)
    return numbers and isinstance(warned, list) and all(isinstance(words, str) for words in warned)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


# --- writing ---------------------------------------------------------------------------------------------------------


def output_of(path: Path) -> Path:
    """Return where the results of samples go: ``<samples>.metrics.json`` beside the file, its shards or the folder."""
    if path.is_dir() and path.suffix != ".shards":
        path = path.resolve()  # of "." the name
        return path.with_name(path.name + ENDING)
    return path.with_suffix(ENDING)


def write(
    path: Path, records: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any], version: str, **more: Any
) -> None:
    """Write results, which appear whole or not at all, in the place of older ones.

    Args:
        path: of the file, as ``output_of`` names it.
        records: what came out, one a metric, as ``Record.to_json`` gives them.
        drawn: how the samples were drawn.
        version: of pathline.
        more: what else is known of the samples, as ``shape``.
    """
    head = {"format": FORMAT, "version": version, "torch": torch.__version__}
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps({**head, **more, "metrics": list(records), "samples": dict(drawn)}, indent=1))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def add(path: Path, records: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any], version: str, **more: Any) -> None:
    """Write results, as ``write`` does, beside older ones of what was drawn alike to the same hash.

    Of one metric and one number of samples the new ones hold, and those of other samples go.
    """
    older = _older(path, drawn)
    kept = [{"version": older["version"], **record} for record in _others(older.get("metrics"), records)]
    if "by_time" in older:
        more["by_time"] = [*_others(older["by_time"], records), *more.get("by_time", ())]
    known = {key: value for key, value in older.items() if key not in _OWN}
    write(path, [*kept, *records], drawn, version, **{**known, **more})


def _older(path: Path, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file of results of the same samples; empty if there is none."""
    if "samples_sha256" not in drawn and "sha256" not in str(drawn.get("checkpoint")):
        return {}
    try:
        Result.read(path)  # which checks it
    except DataError:
        return {}
    content: dict[str, Any] = json.loads(path.read_text())
    same = content.get("samples") == json.loads(json.dumps(drawn)) and "version" in content
    return content if same else {}


def _others(older: Any, newer: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the older records of a metric and a number of samples that no newer one is of."""
    measured = {(record["metric"], record["count"]) for record in newer}
    found = older if isinstance(older, list) else []
    return [r for r in found if isinstance(r, dict) and (r.get("metric"), r.get("count")) not in measured]
