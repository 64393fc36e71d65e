"""Configuration as text: YAML files, which may extend one another, and ``a.b.c=value`` words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from pathline.core.errors import ConfigurationError

__all__ = ["apply", "parse", "read"]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as in YAML 1.2, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise ConfigurationError(f"got the entry {', '.join(sorted(repeated))} twice in one section; keep one")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse(text: str) -> Any:
    """Parse YAML safely.

    Raises:
        ConfigurationError: not YAML, or a key given twice.
    """
    try:
        return yaml.load(text, _Loader)
    except ConfigurationError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the second is a date or a number that is none
        raise ConfigurationError(f"got text that is not YAML: {error}") from error


def read(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of sections.

    ``extends: other.yaml``, relative to the file that says it, takes the sections of another file, which may extend one
    in turn: what a file gives replaces what it extends, entry by entry. A component that is given another ``name``
    replaces the whole component, since another component has other options; a list replaces the whole list.

    Raises:
        ConfigurationError: no such file, not YAML, not a mapping, or files that extend one another in a circle.
    """
    return _read(Path(path), ())


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file and what it extends; ``chain`` names the files that led here, from the first on."""
    way = " extends ".join(map(str, (*chain, path)))
    place = f"got {path}" if not chain else f"in {way}: got {path}"
    if not path.is_file():
        raise ConfigurationError(f"got no file at {way}, expected a configuration; see configs/")
    if path.resolve() in [before.resolve() for before in chain]:
        raise ConfigurationError(f"got files that extend one another in a circle: {way}; take one extends out")
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{place}, which is no text in UTF-8: {error}; see configs/") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"in {way}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{place} with a {type(content).__name__} in it, expected sections")
    if "extends" not in content:
        return content
    other = content.pop("extends")
    if not isinstance(other, str) or not other:
        raise ConfigurationError(f"{place} with extends: {other!r}, expected the name of one file")
    merged: dict[str, Any] = _merged(_read(path.parent / other, (*chain, path)), content)
    return merged


def _merged(base: Any, given: Any) -> Any:
    """Return ``base`` with what is given in its place; a bare name is a component without options."""
    if isinstance(given, dict) and isinstance(base, str):
        base = {"name": base}
    elif isinstance(given, str) and isinstance(base, dict):
        given = {"name": given}
    if not isinstance(given, dict) or not isinstance(base, dict):
        return given
    if base.get("name") is not None and given.get("name") not in (None, base["name"]):
        return given
    return {**base, **{key: _merged(base.get(key), value) for key, value in given.items()}}


def apply(entries: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return entries with ``a.b.c=value`` words applied; numbers in a path index lists.

    A word that gives a component another ``name`` empties its section first, since another component has other options;
    names are applied before all else, so that the order of words does not matter.

    Raises:
        ConfigurationError: a word without ``=``, or a path that does not fit.
    """
    result = deepcopy(entries)
    pairs = []
    for word in words:
        path, found, value = word.partition("=")
        if not found or not path:
            raise ConfigurationError(f"got {word!r}, expected entry=value, as optim.lr=2e-4")
        pairs.append((path.split("."), parse(value)))
    for path_, value_ in sorted(pairs, key=lambda pair: pair[0][-1] != "name"):
        _set(result, path_, value_)
    return result


def _set(entries: Any, path: list[str], value: Any) -> None:
    *parents, last = path
    for depth, key in enumerate(parents):
        entries = _child(entries, key, ".".join(path[: depth + 1]))
    if isinstance(entries, list):
        index = _index(entries, last, ".".join(path))
        entries[index : index + 1] = [value]
    elif last == "name" and entries.get("name") not in (None, value):
        entries.clear()
        entries["name"] = value
    else:
        entries[last] = value


def _child(entries: Any, key: str, path: str) -> Any:
    """Step into a section or a list item, making it where it is missing; a bare name becomes a section."""
    if isinstance(entries, list):
        index = _index(entries, key, path)
        if index == len(entries):
            entries.append({"name": "classifier-free"} if path == f"guidance.{key}" else {})
        holder: Any = entries
        place: Any = index
    else:
        if key == "guidance" and entries.get(key) is None:
            entries[key] = []
        elif entries.get(key) is None:
            entries[key] = {}
        holder, place = entries, key
    if isinstance(holder[place], str):
        holder[place] = {"name": holder[place]}
    if not isinstance(holder[place], dict | list):
        raise ConfigurationError(f"got an entry below {path}, which holds {holder[place]!r}; set {path} itself")
    return holder[place]


def _index(entries: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or int(key) > len(entries):
        raise ConfigurationError(f"got {path}, expected a number from 0 to {len(entries)} for its place in the list")
    return int(key)
