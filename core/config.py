"""The configuration of a run: one typed model, every entry checked before anything starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pathline import backbones, data, encoders, interpolants, objectives, solvers
from pathline.core import overrides
from pathline.core.errors import ConfigurationError, PathlineError, suggest
from pathline.core.registry import Entry, Registry
from pathline.core.sections import Checkpoint, Ema, Evaluation, Guard, Log, Optim, Sample, Section, Train
from pathline.encoders import autoencoders
from pathline.solvers import guidance

__all__ = ["Component", "Configuration", "check_entries", "differences", "filled", "load", "resolve"]


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Component = Annotated[dict[str, Any], BeforeValidator(_named)]
"""``{name, **options}``; a bare name is one without options."""


class Configuration(Section):
    """All sections of a run."""

    data: Component
    interpolant: Component
    backbone: Component
    objective: Component
    encoders: list[Component] = Field(default_factory=list)
    autoencoder: Component | None = None
    optim: Optim = Optim()
    ema: Ema = Ema()
    guard: Guard = Guard()
    train: Train
    solver: Component
    guidance: list[Component] = Field(default_factory=list)
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    sample: Sample = Sample()
    evaluation: Evaluation = Evaluation()

    def to_yaml(self) -> str:
        """Return the configuration as YAML that ``load`` reads back to the same."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


COMPONENTS: dict[str, Registry[Any]] = {
    "data": data.registry,
    "interpolant": interpolants.registry,
    "backbone": backbones.registry,
    "objective": objectives.registry,
    "solver": solvers.registry,
}


def load(path: str | Path, words: list[str] | tuple[str, ...] = ()) -> Configuration:
    """Read a YAML file, apply ``a.b.c=value`` words, and resolve."""
    return resolve(overrides.apply(overrides.read(path), words))


def resolve(entries: Mapping[str, Any]) -> Configuration:
    """Check every entry and fill in the defaults, those of component options included.

    Raises:
        ConfigurationError: unknown, missing, wrong or contradictory entries; one error lists all of them.
    """
    problems: list[str] = []
    filled = {"interpolant": "linear", "solver": "euler-maruyama", **entries}
    for section, registry in COMPONENTS.items():
        if section in filled:
            filled[section] = _component(filled[section], section, registry, problems)
    if filled.get("autoencoder") is not None:
        filled["autoencoder"] = _component(filled["autoencoder"], "autoencoder", autoencoders.registry, problems)
    for section, check in (("guidance", _guidance), ("encoders", _encoder)):
        value = filled.get(section)
        if isinstance(value, list):
            filled[section] = [check(item, f"{section}.{i}", problems) for i, item in enumerate(value)]
        elif isinstance(value, str | Mapping):
            one = value if isinstance(value, str) else "{name: …}"
            problems.append(f"{section}: got {value!r}, expected a list; write {section}: [{one}]")
    configuration = None
    try:
        configuration = Configuration.model_validate(filled)
    except ValidationError as error:
        named = {line.partition(":")[0] for line in problems}
        found = [_explain(dict(detail)) for detail in error.errors()]
        problems += [line for line in found if line.partition(":")[0] not in named]
    if configuration is not None:
        problems += _contradictions(configuration)
    if problems or configuration is None:
        lines = sorted(set(problems))
        head = f"{len(lines)} wrong configuration {'entry' if len(lines) == 1 else 'entries'}:"
        raise ConfigurationError("\n  ".join([head, *lines]))
    return configuration


def filled(component: Mapping[str, Any], registry: Registry[Any]) -> dict[str, Any]:
    """Return a component as ``resolve`` leaves it, with the defaults of its options; wrong ones are not told."""
    result: dict[str, Any] = _component(component, "", registry, [])
    return result


def differences(old: Configuration, new: Configuration) -> list[str]:
    """List the entries that differ between two configurations: ``path: old -> new``."""
    before, after = (dict(_leaves(c.model_dump(mode="json"))) for c in (old, new))
    return [
        f"{path}: {before.get(path)!r} -> {after.get(path)!r}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def check_entries(configuration: Configuration, names: Sequence[str]) -> None:
    """Raise ConfigurationError unless each name is an entry, as ``optim.lr``, or a section."""
    leaves = [path for path, _ in _leaves(configuration.model_dump(mode="json"))]
    known = {".".join(leaf.split(".")[:i]) for leaf in leaves for i in range(1, leaf.count(".") + 2)}
    for name in names:
        if name not in known | Configuration.model_fields.keys():
            raise ConfigurationError(f"got no entry {name!r} to allow; {suggest(name, known)}")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def _component(value: Any, path: str, registry: Registry[Any], problems: list[str]) -> Any:
    """Check one component and fill in its options; problems are added to the list."""
    value = _named(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        problems.append(f"{path}: got {value!r}, expected a name or {{name: …, options}}")
        return value
    options = {key: item for key, item in value.items() if key != "name"}
    try:
        entry = registry.entry(value["name"])
        known = {name: option for name, option in entry.options(options).items() if not _injected(option)}
    except PathlineError as error:
        problems.append(f"{path}.name: {error}")
        return value
    problems += [
        f"{path}.{option}: {registry.kind} {entry.name!r} has no such option; {suggest(str(option), known)}"
        for option in options
        if option not in known
    ]
    return {"name": entry.name, **_options(entry, known, options, path, problems)}


def _guidance(value: Any, path: str, problems: list[str]) -> Any:
    return _component(value, path, guidance.registry, problems)


def _encoder(value: Any, path: str, problems: list[str]) -> Any:
    """Check an encoder; ``cache``, a file of its features, is an option of all of them."""
    value = _named(value)
    if not isinstance(value, Mapping):
        return _component(value, path, encoders.registry, problems)
    cache = _typed(value.get("cache"), str | None, f"{path}.cache", problems)
    own = {key: item for key, item in value.items() if key != "cache"}
    return {**_component(own, path, encoders.registry, problems), "cache": cache}


def _options(
    entry: Entry[Any], known: dict[str, inspect.Parameter], given: dict[str, Any], path: str, problems: list[str]
) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    for name, option in known.items():
        if name not in given and option.default is option.empty:
            problems.append(f"{path}.{name}: missing, {entry.name!r} needs it")
            continue
        value = given.get(name, option.default)
        nested = _nested(option.annotation)
        if nested is not None and value is not None:
            filled[name] = _component(value, f"{path}.{name}", nested, problems)
        else:
            filled[name] = _typed(value, option.annotation, f"{path}.{name}", problems)
    return filled


def _injected(option: inspect.Parameter) -> bool:
    """Whether another section gives the option, as an objective's interpolant."""
    return isinstance(option.annotation, type) and issubclass(option.annotation, interpolants.Interpolant)


def _nested(annotation: Any) -> Registry[Any] | None:
    """Return the registry that an option's component is of, as in ``TimeLawSpec`` or ``TimeLawSpec | None``."""
    if get_origin(annotation) in (Union, UnionType):
        return next((found for part in get_args(annotation) if (found := _nested(part)) is not None), None)
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((item for item in metadata if isinstance(item, Registry)), None)


def _typed(value: Any, annotation: Any, path: str, problems: list[str]) -> Any:
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return value
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
        typed = adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError as error:
        problems.append(f"{path}: got {value!r}; {error.errors()[0]['msg']}")
        return value
    if _truths(value) > _truths(typed):  # pydantic reads true as 1
        problems.append(f"{path}: got {value!r}; expected a number, which true and false are none of")
    return typed


def _truths(value: Any) -> int:
    """Count true and false in a value, lists in it included."""
    return sum(map(_truths, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


def _explain(detail: dict[str, Any]) -> str:
    place = detail["loc"]
    path = ".".join(map(str, place))
    if detail["type"] == "extra_forbidden":
        field = Configuration.model_fields.get(str(place[0])) if len(place) > 1 else None
        model = field.annotation if field else Configuration
        known = model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else ()
        return f"{path}: unknown entry; {suggest(str(place[-1]), known)}"
    if detail["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: got {detail['input']!r}; {detail['msg'].removeprefix('Value error, ')}"


def _contradictions(c: Configuration) -> Iterator[str]:
    train, workers = c.train, c.train.devices * c.train.num_nodes
    if train.global_batch % workers:
        yield f"train.global_batch: got {train.global_batch}, which {workers} devices do not divide"
    elif train.micro_batch is not None and train.micro_batch > train.global_batch // workers:
        yield f"train.micro_batch: got {train.micro_batch}, more than a device's share {train.global_batch // workers}"
    if train.stop_at is not None and train.stop_at > train.steps:
        yield f"train.stop_at: got {train.stop_at}, after the last step {train.steps}"
    if train.strategy == "fsdp" and train.precision == "fp16":
        yield "train.strategy: got fsdp with precision fp16, whose loss scale it cannot share; use bf16, or ddp"
    if train.strategy == "fsdp" and c.optim.name == "muon":
        yield "train.strategy: got fsdp with optim.name muon, whose sums over shards differ by 1e-4; use ddp, or adamw"
    if train.strategy != "auto" and workers == 1:
        yield f"train.strategy: got {train.strategy} for one device; leave it out, or set train.devices"
    every, kept = c.checkpoint.every, c.checkpoint.keep_every
    if kept is not None and kept % every:
        yield f"checkpoint.keep_every: got {kept}, expected a multiple of checkpoint.every {every}; others are not made"
    yield from _optimizer_contradictions(c.optim, train.steps)
    yield from _average_contradictions(c.ema, train.steps)
    yield from _sample_contradictions(c.sample, c.ema.names)
    if not c.evaluation.metrics:
        yield "evaluation.metrics: got none; name one or more, as frechet"
    for name in c.evaluation.averages:
        if name not in c.ema.names:
            yield f"evaluation.averages: got {name!r}; {suggest(name, c.ema.names)}"


def _optimizer_contradictions(optim: Optim, steps: int) -> Iterator[str]:
    if optim.warmup_steps > steps:
        yield f"optim.warmup_steps: got {optim.warmup_steps}, more than train.steps {steps}"
    if optim.schedule == "constant" and optim.final_lr_fraction:
        yield f"optim.final_lr_fraction: got {optim.final_lr_fraction} beside a constant schedule; use cosine"
    if optim.name != "muon" and optim.muon_momentum != Optim().muon_momentum:
        yield f"optim.muon_momentum: got {optim.muon_momentum} for {optim.name}; use optim.name=muon"


def _average_contradictions(ema: Ema, steps: int) -> Iterator[str]:
    names = ema.names
    if not names:
        yield "ema.decay: got none, and no ema.lengths; samples are drawn with an average, so give one of them"
    if len(set(names)) < len(names):
        yield f"ema.lengths: got {list(ema.lengths)}, equal to three decimals; leave one out"
    if ema.decay is None and not ema.warmup:
        yield "ema.warmup: got false without ema.decay, whose warm-up it is; leave it out"
    if ema.snapshot_every is not None and len(ema.lengths) < 2:
        yield f"ema.snapshot_every: got {ema.snapshot_every} with {len(ema.lengths)} ema.lengths; give two or more"
    elif ema.snapshot_every is not None and ema.snapshot_every > steps:
        yield f"ema.snapshot_every: got {ema.snapshot_every}, more than train.steps {steps}"


def _sample_contradictions(sample: Sample, names: list[str]) -> Iterator[str]:
    if sample.output is not None and not sample.output.endswith(".npz"):
        yield f"sample.output: got {sample.output}, expected a name that ends in .npz"
    if sample.average is not None and sample.average not in names:
        yield f"sample.average: got {sample.average!r}; {suggest(sample.average, names)}"
