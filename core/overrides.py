"""Configuration as text: YAML files and ``a.b.c=value`` words."""

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

    Raises:
        ConfigurationError: no such file, not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"got no file at {path}, expected a configuration; see configs/")
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"got {path}, which is no text in UTF-8: {error}; see configs/") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"got {path} with a {type(content).__name__} in it, expected sections")
    return content


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
