"""The Inception network that FID is defined by: TensorFlow's of 2015-12-05, as torch-fidelity carries it to torch.

N images.
"""

from __future__ import annotations

import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pathline.core.checks import require
from pathline.core.errors import MissingPackageError, WeightsError
from pathline.encoders.networks import hash_of_file
from pathline.metrics.features import Features, as_levels, full_precision, registry

__all__ = ["SHA256", "Inception"]

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the published file, 95,628,359 bytes
_CHANNELS = 7  # of the 192 of mixed_6's first branch that sFID is of, 7·17·17 = 2023 values


@registry.register("inception")
class Inception(Features):
    """Features of ``inception-v3-compat``: 2048 pooled ones, the 2023 of sFID, and 1008 logits without their bias.

    All three come from one pass in float32, without TF32. Images are taken as levels 0 … 255, of one channel three
    times, and resized to 299 × 299 as TensorFlow 1 did it (bilinear, corners not aligned, no half pixel), then
    (x − 128)/128. sFID's are the first 7 channels of the 1 × 1 branch of ``Mixed_6d`` after its ReLU
    (``mixed_6/conv:0`` of the graph), in the order row, column, channel, as ADM's evaluator flattens them.

    Args:
        weights: path of ``weights-inception-2015-12-05-6726825d.pth``; None takes torch-fidelity's file from torch
            hub's cache, or from the net into it.
        unverified: take a file whose hash is another than the published one's; figures then compare with no others.

    Raises:
        MissingPackageError: torch-fidelity cannot be imported.
        WeightsError: weights that cannot be had, are not the published ones, or do not fit.
    """

    name = "inception"

    def __init__(self, weights: str | None = None, unverified: bool = False) -> None:
        module = _module()
        path = _downloaded(module.URL_INCEPTION_V3) if weights is None else Path(weights).expanduser()
        sha256 = hash_of_file(path)
        if sha256 != SHA256 and not unverified:
            raise WeightsError(
                f"got {path} with the SHA-256 {sha256}, expected {SHA256}, that of the published file "
                f"{module.URL_INCEPTION_V3}; use that file, or set unverified: true for figures of your own"
            )
        self.network = _filled(module, path)
        self.sizes = {"features": 2048, "spatial": _CHANNELS * 17 * 17, "logits": 1008}
        self.manifest = {"name": self.name, "sha256": sha256, "verified": sha256 == SHA256, "sizes": self.sizes}
        self._spatial = torch.zeros(0)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    network: Any  # torch-fidelity has no types

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self.network.to(device)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        """Return the pooled features, (N, 2048)."""
        return self.outputs(images)["features"]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``features`` (N, 2048), ``spatial`` (N, 2023) and ``logits`` (N, 1008), in float32."""
        levels = as_levels(images.to(self.device)).expand(-1, 3, -1, -1)
        with full_precision():
            pooled, logits = self.network(levels)
        return {"features": pooled, "spatial": self._spatial, "logits": logits}

    def _keep(self, module: Any, given: Any, said: Tensor) -> None:
        del module, given
        self._spatial = rearrange(said[:, :_CHANNELS], "n c h w -> n (h w c)").clone()


def _module() -> Any:
    """Import torch-fidelity's Inception.

    Raises:
        MissingPackageError: it is not installed, or torchvision, which it imports, is of another torch build.
    """
    try:
        return require("torch_fidelity.feature_extractor_inceptionv3", "inception")
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise MissingPackageError(
            f"got torchvision {version('torchvision')} built for another torch than {torch.__version__}, so that "
            f"torch-fidelity cannot be imported ({error}); install the torchvision built for this torch (pip install "
            "torchvision --index-url of the same index as torch's), or the torch that this torchvision was built for"
        ) from error


def _downloaded(url: str) -> Path:
    """Return the published file in torch hub's cache, after loading it where it is not there yet.

    Raises:
        WeightsError: it cannot be had.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=SHA256, progress=False)
    except (OSError, RuntimeError) as error:  # the second: another hash
        raise WeightsError(
            f"got no weights of Inception from {url} ({error}); give weights: PATH of that file, or put it at {path}"
        ) from error
    return path


def _filled(module: Any, path: Path) -> Any:
    """Return the network with the tensors of a file, of which nothing is executed.

    Raises:
        WeightsError: it is damaged, holds more than tensors, or those of another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zip files and of the unpickler
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(f"got {path}, which cannot be read as weights alone ({said}); use another file") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"got {path}, which holds no dictionary of tensors; use another file")
    checked = io.BytesIO()  # the constructor unpickles what it is given: it is given a file of ours, of tensors alone
    torch.save(dict(state), checked)
    checked.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights first
            return module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=checked
            )
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise WeightsError(f"got {path} of another network than Inception ({said}); use another file") from error
