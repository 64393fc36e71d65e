"""Where an autoencoder's files lie, and the network that is read from them."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pathline.core.checks import require
from pathline.core.errors import MissingPackageError, WeightsError
from pathline.encoders.autoencoders.kinds import FIELDS, Kind, kind_of
from pathline.encoders.networks import hash_of_file

__all__ = ["Files", "find", "load"]

CONFIGURATION, WEIGHTS, PICKLED = "config.json", "diffusion_pytorch_model", "diffusion_pytorch_model.bin"
LARGEST = 2**20  # bytes of a configuration
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Files(NamedTuple):
    """Files of an autoencoder in one folder.

    Attributes:
        folder: that holds both.
        weights: path of the weights.
        configuration: what ``config.json`` says.
        kind: the row of its class.
    """

    folder: Path
    weights: Path
    configuration: dict[str, Any]
    kind: Kind

    @property
    def class_name(self) -> str:
        """Name of its class in diffusers."""
        return str(self.configuration["_class_name"])


def find(model: str, subfolder: str | None, variant: str | None) -> Files:
    """Find the files of an autoencoder in a local folder, or on the hub.

    Args:
        model: a folder, or ``owner/name`` on the hub of Hugging Face.
        subfolder: of either, as ``vae``.
        variant: of the weights, as ``fp16``.

    Raises:
        WeightsError: files that are not there, that cannot be had, or are no autoencoder's of a known class.
    """
    name = f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"
    if Path(model).expanduser().is_dir():
        folder = Path(model).expanduser() / (subfolder or "")
    elif HUB_NAME.fullmatch(model):
        folder = _from_hub(model, subfolder, CONFIGURATION).parent
    else:
        raise WeightsError(f"got no folder {model}; give one that diffusers wrote, or owner/name on the hub")
    told = _configuration(folder / CONFIGURATION)
    kind = kind_of(str(told.get("_class_name")), str(folder))
    if not Path(model).expanduser().is_dir():
        _from_hub(model, subfolder, name)
    if not (folder / name).is_file():
        pickled = f"; {PICKLED}, which is there, executes what it holds" if (folder / PICKLED).is_file() else ""
        raise WeightsError(f"got no {name} in {folder}{pickled}; save the autoencoder by save_pretrained")
    return Files(folder, folder / name, told, kind)


def _from_hub(model: str, subfolder: str | None, name: str) -> Path:
    """Return the path of a file of a repository in the hub's cache, after loading it where it is not there yet."""
    try:
        return Path(require("huggingface_hub", "autoencoders").hf_hub_download(model, name, subfolder=subfolder))
    except MissingPackageError:
        raise
    except Exception as error:  # the hub's client has many of its own
        said = next(iter(str(error).split("\n")), "") or type(error).__name__
        raise WeightsError(
            f"got no {name} of {model} from the hub ({said}); give model: FOLDER of a copy, or let huggingface_hub "
            "reach the hub once, logged in where the autoencoder asks for it, after which it has the files in its cache"
        ) from error


def _configuration(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise WeightsError(f"got no {CONFIGURATION} in {path.parent}; give a folder that diffusers wrote")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"got {path}, which cannot be read ({error}); use another copy") from error
    if not isinstance(told, dict):
        raise WeightsError(f"got {path}, which holds no object; use another copy")
    return told


def load(files: Files) -> tuple[Any, str]:
    """Return the network in float32 on the host, and the hash of its weights; torch's generator is left as it was.

    Raises:
        WeightsError: weights that do not fit the configuration, or a field of it that the class does not know.
        MissingPackageError: a package that it needs.
    """
    kind = _class(files.class_name)
    _check_fields(kind, files)
    try:
        with torch.random.fork_rng(devices=[]):
            _check_size(kind, files)
            sha256 = hash_of_file(files.weights)
            network, told = kind.from_pretrained(
                str(files.folder),
                variant=_variant(files.weights),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                torch_dtype=torch.float32,
            )
    except NameError as error:  # of a class that transformers has
        raise MissingPackageError(
            f"got {files.class_name}, which needs transformers; pip install transformers"
        ) from error
    except WeightsError:
        raise
    except Exception as error:  # of safetensors, of the class, and diffusers' own
        said = next(iter(str(error).split("\n")), "") or type(error).__name__
        raise WeightsError(f"got {files.folder}, which {files.class_name} cannot be read from ({said})") from error
    wrong = {key.removesuffix("_keys").replace("_", " "): found for key, found in told.items() if found}
    if wrong:
        raise WeightsError(f"got {files.weights}, which does not fit its {CONFIGURATION} ({wrong}); use another copy")
    return network, sha256


def _variant(weights: Path) -> str | None:
    return weights.name.removeprefix(WEIGHTS).removesuffix(".safetensors").removeprefix(".") or None


def _class(name: str) -> Any:
    """Import a class of diffusers.

    Raises:
        MissingPackageError: diffusers is not installed, or too old, or its torchvision is of another torch build.
    """
    try:
        diffusers = require("diffusers", "autoencoders")
        if not hasattr(diffusers, name):
            raise MissingPackageError(f"got diffusers {version('diffusers')} without {name}; pip install -U diffusers")
        return getattr(diffusers, name)
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise MissingPackageError(
            f"got torchvision {version('torchvision')} built for another torch than {torch.__version__}, so that "
            f"diffusers' {name} cannot be imported; install the torchvision built for this torch (pip install "
            "torchvision --index-url of the same index as torch's), or take torchvision away"
        ) from error


def _check_fields(kind: Any, files: Files) -> None:
    """Raise WeightsError for fields of scaling that the class would leave unused, as of an older diffusers."""
    known: Mapping[str, Any] = inspect.signature(kind.__init__).parameters
    for field in FIELDS:
        if files.configuration.get(field) is not None and field not in known:
            raise WeightsError(
                f"got {field} in {files.folder / CONFIGURATION}, which {files.class_name} of diffusers "
                f"{importlib.import_module('diffusers').__version__} does not know; install a newer one"
            )


def _check_size(kind: Any, files: Files) -> None:
    """Raise WeightsError for a configuration of more values than the weights have bytes, before any is allocated."""
    with torch.device("meta"):
        wanted = sum(tensor.numel() for tensor in kind.from_config(files.configuration).state_dict().values())
    size = files.weights.stat().st_size
    if wanted > size:
        raise WeightsError(
            f"got {files.weights} of {size} bytes for {wanted} values of its {CONFIGURATION}; use another copy"
        )
