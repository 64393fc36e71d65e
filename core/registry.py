"""Components by name: one registry a kind, filled by a decorator, extended by plugins through entry points.

Plugins are found on the first lookup that the core alone cannot answer: importing the module that an entry point of
the group ``pathline.plugins`` names registers its components. A plugin that fails to import warns once, and raises,
chained, when a name is asked for that only it can have brought.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from pathline.core.errors import InputTypeError, PluginError, UnknownNameError, UnknownOptionError, suggest

__all__ = ["Entry", "Plugins", "Registry", "plugins", "registries"]

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])
Options = dict[str, inspect.Parameter]

GROUP = "pathline.plugins"


class Plugins:
    """The plugins of the installed distributions, imported once, when first needed."""

    def __init__(self, find: Callable[[], list[EntryPoint]] | None = None) -> None:
        self._find = find or (lambda: list(entry_points(group=GROUP)))
        self._loaded = False
        self.broken: dict[str, Exception] = {}

    def load(self) -> None:
        """Import every plugin that has not been imported yet; warn of those that fail.

        Raises:
            PluginError: two distributions use one name for different modules.
        """
        if self._loaded:
            return
        found = self._distinct()
        self._loaded = True  # before importing: a plugin may look names up itself
        for point in found:
            try:
                importlib.import_module(point.value)
            except Exception as error:  # whatever a plugin raises must not take the others down
                self.broken[point.name] = error
                warnings.warn(f"plugin {_describe(point)} failed to import: {error!r}", stacklevel=3)

    def _distinct(self) -> list[EntryPoint]:
        by_name: dict[str, EntryPoint] = {}
        for point in self._find():
            other = by_name.setdefault(point.name, point)
            if other.value != point.value:
                raise PluginError(
                    f"got two plugins named {point.name!r}: {_describe(other)} and {_describe(point)}; uninstall one"
                )
        return list(by_name.values())


def _describe(point: EntryPoint) -> str:
    owner = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    return f"{point.name!r} ({point.value}{owner})"


plugins = Plugins()
_registries: dict[str, Registry[Any]] = {}


def registries() -> dict[str, Registry[Any]]:
    """Every registry by its dotted place, as ``solvers.grids``."""
    return dict(sorted(_registries.items()))


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered component: its name, what builds it, and where further options are declared."""

    name: str
    factory: Callable[..., T]
    inherits: Callable[[Mapping[str, Any]], Options] | None = None

    @property
    def owner(self) -> str:
        """Module and qualified name of the factory."""
        return f"{self.factory.__module__}.{self.factory.__qualname__}"

    def options(self, given: Mapping[str, Any] | None = None) -> Options:
        """Options by name, with those of a component that this one builds in turn (its trunk, say)."""
        own = {
            name: parameter
            for name, parameter in _signature(self.factory).parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }
        inherited = self.inherits(given or {}) if self.inherits else {}
        return {**inherited, **own}


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    """Signature with its annotations evaluated, where they can be."""
    try:
        return inspect.signature(factory, eval_str=True)
    except NameError:  # an annotation that only a type checker can see
        return inspect.signature(factory)


class Registry(Generic[T]):
    """Components of one kind.

    Args:
        kind: what an entry is, in error messages: ``"interpolant"``.
        place: dotted place of the functions users call, as ``"solvers.grids"``.
        base: the type of an instance, which ``build`` hands back as it is.
    """

    def __init__(self, kind: str, place: str, base: type[Any]) -> None:
        self.kind, self.place, self.base = kind, place, base
        self._entries: dict[str, Entry[T]] = {}
        self._aliases: dict[str, str] = {}
        _registries[place] = self

    def register(
        self,
        name: str,
        *,
        aliases: tuple[str, ...] = (),
        inherits: Callable[[Mapping[str, Any]], Options] | None = None,
    ) -> Callable[[C], C]:
        """Register the decorated class or function under ``name`` and ``aliases``.

        Args:
            inherits: for a component that hands options on: given options -> the further options it accepts.

        Raises:
            UnknownNameError: another component already has one of the names; both owners are named.
        """

        def decorate(factory: C) -> C:
            entry = Entry(name, cast("Callable[..., T]", factory), inherits)
            for word in (name, *aliases):
                holder = self._entries.get(self._aliases.get(word, word))
                if holder and holder.owner != entry.owner:  # a cell run again replaces its own class
                    raise UnknownNameError(
                        f"{self.kind} {word!r} is registered twice: by {holder.owner} and by {entry.owner}; rename one"
                    )
            self._entries[name] = entry
            self._aliases.update(dict.fromkeys(aliases, name))
            return factory

        return decorate

    def names(self) -> list[str]:
        """Every registered name, sorted; aliases left out."""
        plugins.load()
        return sorted(self._entries)

    def aliases(self) -> dict[str, str]:
        """Alias -> name."""
        plugins.load()
        return dict(self._aliases)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter([self._entries[name] for name in self.names()])

    def entry(self, name: str) -> Entry[T]:
        """Return the entry of a name or an alias.

        Raises:
            UnknownNameError: no such name; carries the nearest one and the full list.
            PluginError: no such name, and a plugin that may bring it failed to import; chained.
        """
        if self._aliases.get(name, name) not in self._entries:
            plugins.load()
        found = self._entries.get(self._aliases.get(name, name))
        if found:
            return found
        unknown = f"unknown {self.kind} {name!r}; {suggest(name, self._entries)}"
        for plugin, error in plugins.broken.items():
            raise PluginError(f"{unknown}. Plugin {plugin!r}, which may bring it, failed to import") from error
        raise UnknownNameError(unknown)

    def build(self, component: str | Mapping[str, Any] | T, **options: Any) -> T:
        """Build a component.

        Args:
            component: a name; a mapping ``{"name": …, **options}``, as in configuration files; or an instance, which
                is returned as it is.
            options: keyword arguments of the constructor.

        Raises:
            UnknownNameError: no such name.
            UnknownOptionError: an option that the component does not have, or a missing one.
            InputTypeError: neither a name nor an instance.
        """
        if isinstance(component, Mapping):
            rest = {key: value for key, value in component.items() if key != "name"}
            if "name" not in component:
                raise UnknownOptionError(f"got a {self.kind} without a name: {dict(component)}; add name: …")
            return self.build(component["name"], **{**rest, **options})
        if isinstance(component, str):
            entry = self.entry(component)
            problems = self.problems(entry, options)
            if problems:
                raise UnknownOptionError("; ".join(problems.values()))
            return entry.factory(**options)
        if not isinstance(component, self.base):
            raise InputTypeError(
                f"got {type(component).__name__} for a {self.kind}, expected a name or a {self.base.__name__}"
            )
        if options:
            raise UnknownOptionError(
                f"got options {sorted(options)} beside a finished {self.kind}; give its name instead"
            )
        return cast("T", component)

    def problems(self, entry: Entry[T], options: Mapping[str, Any]) -> dict[str, str]:
        """Unknown and missing options of a call: option -> what is wrong with it."""
        known = entry.options(options)
        found = {
            option: f"{self.kind} {entry.name!r} has no option {option!r}; {suggest(option, known)}"
            for option in options
            if option not in known
        }
        found |= {
            option: f"{self.kind} {entry.name!r} needs the option {option!r}"
            for option, parameter in known.items()
            if parameter.default is parameter.empty and option not in options
        }
        return found
