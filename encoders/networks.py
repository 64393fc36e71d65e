"""Networks of timm: imported when an encoder is built, made at the size that they are shown, filled from a file or hub.

D width.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathline.core.checks import require
from pathline.core.errors import InputError, MissingPackageError, UnknownNameError, WeightsError

__all__ = ["create", "fill", "from_hub", "hash_of_file", "hash_of_tensors", "mocov3_state", "patch_size", "read_state"]

# of a checkpoint, what stands behind the tokens, or beside them in training
HEADS = ("head", "fc", "fc_norm", "attn_pool", "decoder", "mask_token")
# in the large MoCo v3's checkpoint a norm and a layer of these blocks are called after the block; REPA reads it so
MISNOMERS = {
    "blocks.13.norm13.": "blocks.13.norm1.",
    "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
    "blocks.14.norm14.": "blocks.14.norm2.",
    "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
}


def _timm() -> Any:
    """Import timm.

    Raises:
        MissingPackageError: it is not installed, or torchvision, which it imports, is of another torch build.
    """
    try:
        return require("timm", "encoders")
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise MissingPackageError(
            f"got torchvision {version('torchvision')} built for another torch than {torch.__version__}, so that timm "
            f"cannot be imported ({error}); install the torchvision built for this torch (pip install torchvision "
            "--index-url of the same index as torch's), or the torch that this torchvision was built for"
        ) from error


def create(model: str, size: tuple[int, int] | None, changes: Mapping[str, Any]) -> nn.Module:
    """Return a ViT of timm without weights and without a head; torch's own generator is left as it was.

    Args:
        model: its name, with or without a tag.
        size: height and width that it is shown; None is its own.
        changes: further options of it.

    Raises:
        MissingPackageError: see ``_timm``.
        UnknownNameError: timm has no such model.
        InputError: it is no ViT, or refuses the size.
    """
    _check_name(model)
    sized = {} if size is None else {"img_size": size}
    return _created(model, {"pretrained": False, "num_classes": 0, **sized, **changes})


def _check_name(model: str) -> None:
    timm = _timm()
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        raise UnknownNameError(
            f"timm {timm.__version__} has no model {model!r}; "
            f"{'did you mean ' + ' or '.join(near) if near else 'see timm.list_models()'}, or install a newer timm"
        )


def _created(model: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = _timm().create_model(model, **options)
    except TypeError as error:
        raise InputError(
            f"got timm model {model!r}, which is no ViT: it cannot be made of a number of blocks for a size of "
            "images; name one, as vit_base_patch16_224"
        ) from error
    except AssertionError as error:
        raise InputError(
            f"got timm model {model!r}, which cannot be made with {options} ({error}); name a ViT"
        ) from error
    if not all(hasattr(network, name) for name in ("patch_embed", "num_prefix_tokens", "blocks", "norm")):
        raise InputError(f"got timm model {model!r}, a {type(network).__name__} without patch tokens; name a ViT")
    return network


def patch_size(model: str, changes: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of a model's patches, from one block of it; nothing is allocated."""
    with torch.device("meta"):
        patches: Any = create(model, None, {**changes, "depth": 1}).patch_embed
    height, width = patches.patch_size
    return int(height), int(width)


def from_hub(model: str, size: tuple[int, int], changes: Mapping[str, Any]) -> nn.Module:
    """Return a model with the weights of its tag, its position table resampled to the size.

    Raises:
        WeightsError: there are none, or they cannot be had.
    """
    _check_name(model)
    try:
        return _created(model, {"pretrained": True, "num_classes": 0, "img_size": size, **changes})
    except InputError:
        raise
    except Exception as error:  # the hub's client has many of its own
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(
            f"got no weights of {model} from timm's hub ({said}); give weights: PATH of a .safetensors or .pth "
            "file, or let timm reach the hub once, after which it has them in its cache"
        ) from error


def read_state(path: Path) -> tuple[dict[str, Any], str]:
    """Read a file of weights: .safetensors, or what ``torch.save`` wrote, of which nothing is executed.

    Returns:
        What it holds, and the hash of the file.

    Raises:
        WeightsError: there is none, or it is damaged, or holds more than weights.
    """
    sha256 = hash_of_file(path)
    _timm()
    try:
        state: dict[str, Any] = importlib.import_module("timm.models").load_state_dict(str(path), weights_only=True)
    except Exception as error:  # of zip files, of the unpickler, of safetensors
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(f"got {path}, which cannot be read as weights alone ({said}); use another file") from error
    return state, sha256


def mocov3_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder of an authors' MoCo v3 checkpoint under timm's names; other states as they are."""
    prefix = "base_encoder."
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    for wrong, right in MISNOMERS.items():
        for key in [key for key in found if key.startswith(wrong)]:
            found[right + key.removeprefix(wrong)] = found.pop(key)
    return found or dict(state)


def fill(network: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Load weights into a model, their position table resampled to its own by timm (bicubic, antialiased).

    Raises:
        WeightsError: weights that are missing, left over or of another shape; heads may be.
    """
    try:
        module: Any = importlib.import_module(type(network).__module__)
        converted: dict[str, Tensor] = module.checkpoint_filter_fn(dict(state), network)
    except Exception as error:  # whatever a foreign dictionary does to it
        raise WeightsError(f"got {path} of a layout that timm does not know ({error!r}); use another file") from error
    wanted = network.state_dict()
    given = {key: value for key, value in converted.items() if key in wanted or key.split(".")[0] not in HEADS}
    wrong = {
        "missing": [key for key in wanted if key not in given],
        "left over": [key for key in given if key not in wanted],
        "of another shape": [key for key in wanted if key in given and wanted[key].shape != given[key].shape],
    }
    if any(wrong.values()):
        said = "; ".join(f"{len(keys)} {what}, as {keys[0]}" for what, keys in wrong.items() if keys)
        raise WeightsError(
            f"got {path} of another model than {type(network).__name__} wants ({said}); use another file"
        )
    network.load_state_dict(given)


def hash_of_file(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        WeightsError: there is none.
    """
    if not path.is_file():
        raise WeightsError(f"got no file {path}; give weights: PATH of a .safetensors or .pth file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_tensors(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors on the host with their names, shapes and types, in the order of names."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        found.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
