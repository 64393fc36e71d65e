"""Prepare images for training: ``python -m pathline.data.prepare SOURCE OUTPUT --resolution 256 [options]``.

Latents of an autoencoder, or pixels, with labels and, if asked for, encoder features, packed in shards beside a
``manifest.json``; training reads the folder as data ``prepared``. What a shard holds is a function of the request
alone, whatever the number of processes: a command that was interrupted, or killed at any point, is given again and
goes on.

R side of the images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only

from pathline import encoders
from pathline.core.errors import ConfigurationError, DataError, InputError, PathlineError, ProcessError
from pathline.core.registry import Registry
from pathline.data.prepare.encoding import Encoding
from pathline.data.prepare.folder import Folder
from pathline.data.prepare.images import chosen_images
from pathline.data.prepare.machine import launched, settle, terminated_as_interrupted
from pathline.data.prepare.manifest import Manifest
from pathline.data.prepare.request import Options, request_of
from pathline.data.prepare.work import Stopped, Work
from pathline.data.sources import ImageSource, source_of
from pathline.encoders import Encoder, autoencoders
from pathline.encoders.autoencoders import Autoencoder

__all__ = ["Options", "main", "prepare"]

TOGETHER = 16  # images encoded at once: always the same ones, so that no bit depends on the processes
LOST, INTERRUPTED = 70, 75  # exit codes, those of training


def prepare(
    source: ImageSource,
    output: Path,
    options: Options,
    *,
    autoencoder: Autoencoder | None = None,
    features: Mapping[str, tuple[Mapping[str, Any], Encoder]] | None = None,
    fabric: Fabric | None = None,
    batch: int = 64,
) -> Manifest:
    """Prepare a source's images, or go on with what was begun; the folder is whole once it has a manifest.

    Args:
        source: of the images.
        output: folder to write.
        options: of what is written.
        autoencoder: that encodes them; None for pixels.
        features: encoders whose tokens are stored: by name their entries in a configuration, and themselves.
        fabric: launched; of several processes each takes shards of its own. None for this one alone, on the CPU.
        batch: images that are decoded ahead of what is encoded.

    Raises:
        ConfigurationError: options that cannot be.
        DataError: an image that cannot be read or stored, or a folder that belongs to something else.
        InputError: a resolution that autoencoder or encoders do not take.
        ProcessError: another process is gone.
    """
    fabric, given = fabric or Fabric(accelerator="cpu", devices=1), features or {}
    options.check(pixels=autoencoder is None)
    if not len(source):
        raise DataError("got a source without images, expected some; check its path")
    numbers = chosen_images(len(source), options.limit, options.seed)
    request = request_of(
        source,
        len(numbers),
        options,
        None if autoencoder is None else autoencoder.manifest,
        {name: {"component": entry, "encoder": encoder.manifest} for name, (entry, encoder) in given.items()},
        together=min(TOGETHER, getattr(autoencoder, "slices", TOGETHER)),
        device=fabric.device.type,
    )
    folder = Folder(output, request)
    if autoencoder is not None:
        _check_scaling(autoencoder, options.resolution)
        autoencoder.to(fabric.device)
    encoding = Encoding(
        None if autoencoder is None else autoencoder.moments,
        {name: encoder.to(fabric.device) for name, (_, encoder) in given.items()},
        flip=options.flip,
        images=options.images,
        dtype=options.dtype,
        device=fabric.device,
    )
    return Work(source, numbers, encoding, folder, fabric, batch).run()


def _check_scaling(autoencoder: Autoencoder, resolution: int) -> None:
    """Check that an autoencoder takes a resolution, and scales as its manifest says, which is all that is kept.

    Raises:
        InputError: it does not.
    """
    shape, told = autoencoder.latent_shape(resolution), autoencoder.manifest["scaling"]
    z = torch.linspace(-3, 3, 7).reshape(-1, 1, 1, 1).expand(-1, *shape)
    mean, std = (torch.tensor(told[key])[:, None, None] for key in ("mean", "std"))
    if not torch.allclose(autoencoder.to_model(z).cpu(), (z - mean) / std, rtol=1e-4, atol=1e-5):
        raise InputError(
            f"got the autoencoder {autoencoder.manifest['name']}, whose to_model is not (z - mean)/std of the scaling "
            "in its manifest; correct one of them"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for a wrong input, 70 for a lost process, 75 if interrupted.

    Processes that Fabric started return 0: on any other code it kills all of them at once, also the first one, which
    has yet to hear of it and to say how it ended.
    """
    given = _parser().parse_args(arguments)
    with terminated_as_interrupted():
        code = _code(given)
    return code if _rank() == 0 or TorchElasticEnvironment.detect() else 0


def _code(given: argparse.Namespace) -> int:
    try:
        options = _options(given)
        fabric = launched(given.devices, given.accelerator)
        manifest = _run(given, options, fabric)
    except KeyboardInterrupt:
        return _said(
            f"\ninterrupted; what is whole stays in {given.output}: give the command again to go on", INTERRUPTED
        )
    except Stopped as error:
        return _said(f"stopped: {error}", 2)
    except ProcessError as error:
        return _said(f"error: {error}", LOST)
    except (PathlineError, OSError) as error:  # which may be of this process alone
        print(f"error{f' (process {_rank() + 1})' if _rank() else ''}: {error}", file=sys.stderr, flush=True)
        return 2
    if fabric.is_global_zero:
        size = sum(shard.bytes for shard in manifest.shards) / 2**20
        gone = f", {len(manifest.dropped):,} left out" if manifest.dropped else ""
        print(f"{manifest.count:,} images{gone}: {len(manifest.shards)} shards in {given.output}, {size:,.1f} MiB")
    return 0


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)


def _said(text: str, code: int) -> int:
    """Let the first process say what all of them have to say; return the exit code."""
    if _rank() == 0:
        print(text, file=sys.stderr, flush=True)
    return code


def _options(given: argparse.Namespace) -> Options:
    """Check what can be checked before other processes are started."""
    if given.batch < 1:
        raise ConfigurationError(f"got --batch {given.batch}, expected 1 or more")
    names = ("resolution", "flip", "images", "rows_per_shard", "dtype", "seed", "limit", "on_error", "licence")
    options = Options(**{name: getattr(given, name) for name in names})
    options.check(pixels=given.autoencoder is None)
    for text in (given.kind, *given.encoder, *([] if given.autoencoder is None else [given.autoencoder])):
        _component(text)
    return options


def _run(given: argparse.Namespace, options: Options, fabric: Fabric) -> Manifest:
    """Build what the command names, and prepare."""
    settle(fabric.device)
    autoencoder = None if given.autoencoder is None else autoencoders.build(_component(given.autoencoder))
    features: dict[str, tuple[Mapping[str, Any], Encoder]] = {}
    for text in given.encoder:
        entry = _filled({"resolution": given.resolution, **_component(text)}, encoders.registry)
        if entry["name"] in features:
            raise ConfigurationError(f"got --encoder {entry['name']} twice, expected each once")
        features[entry["name"]] = entry, encoders.build(entry)
    source = source_of(given.source, _component(given.kind))
    if source.manifest.get("name") == "folder" and given.output.resolve().is_relative_to(Path(given.source).resolve()):
        raise ConfigurationError(
            f"got {given.output} to write to, which lies in the folder {given.source} of images and would become a "
            "part of it; name another folder"
        )
    return prepare(
        source, given.output, options, autoencoder=autoencoder, features=features, fabric=fabric, batch=given.batch
    )


def _component(text: str) -> dict[str, Any]:
    """Return the component that ``name``, ``name,option=value,…`` or ``{name: …, option: value}`` means.

    Raises:
        ConfigurationError: something else.
    """
    try:
        if text.lstrip().startswith("{"):
            found = yaml.safe_load(text)
        else:
            name, *words = text.split(",")
            pairs = [word.partition("=") for word in words]
            if not all(key and equals for key, equals, _ in pairs):
                raise ConfigurationError(f"got {text!r}, expected name,option=value,option=value")
            found = {"name": name, **{key: yaml.safe_load(value) for key, _, value in pairs}}
    except yaml.YAMLError as error:
        raise ConfigurationError(f"got {text!r}, which is not YAML: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ConfigurationError(f"got {text!r}, expected a name, or {{name: …, option: value}}")
    return found


def _filled(component: Mapping[str, Any], registry: Registry[Any]) -> dict[str, Any]:
    """Return a component with the defaults of its options, as a configuration has it."""
    known = registry.entry(component["name"]).options(component)
    defaults = {name: option.default for name, option in known.items() if option.default is not option.empty}
    return {**defaults, **component}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pathline.data.prepare",
        description="Pack images for training, as latents of an autoencoder or as pixels. A command that was "
        "interrupted is given again, and goes on.",
        epilog="Components are written as name, as name,option=value,option=value, or as {name: …, option: value}.",
    )
    add = parser.add_argument
    add("source", help="folder or archive of images")
    add("output", type=Path, help="folder to write, for data {name: prepared, path: OUTPUT}")
    add("--resolution", type=int, required=True, help="side of the square that images are cropped to")
    add(
        "--kind",
        metavar="COMPONENT",
        default="auto",
        help="what the source is, as cifar,labels=coarse or auto,exif=true",
    )
    add("--autoencoder", metavar="COMPONENT", help="as sd-vae-ft-ema; without one, pixels are stored")
    add(
        "--encoder",
        metavar="COMPONENT",
        action="append",
        default=[],
        help="store its tokens, as of dinov2-b; repeatable",
    )
    add("--flip", action="store_true", help="encode the mirror image as well, for training to choose from")
    add("--images", action="store_true", help="store pixels beside latents")
    add("--batch", type=int, default=64, help="images decoded ahead (default 64); shards do not depend on it")
    add("--rows-per-shard", type=int, default=50_000, help="images of a shard (default 50000)")
    add("--devices", type=int, default=1, help="processes, each with a device of its own, or one core (default 1)")
    add("--accelerator", default="auto", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of stored latents")
    add("--limit", type=int, help="prepare this many images alone, chosen by --seed")
    add("--seed", type=int, default=0, help="of the choice that --limit makes")
    add("--on-error", choices=("stop", "drop"), default="stop", help="what an image that cannot be read or stored does")
    add("--licence", help="a note to keep in the manifest")
    return parser
