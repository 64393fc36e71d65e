"""What becomes of images before they are stored: the columns of a shard, by an autoencoder and by encoders.

n images of R × R pixels; C, h, w the shape of a latent; T tokens of width D.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from pathline.core.draws import send
from pathline.core.errors import InputError
from pathline.data.prepare.columns import FEATURES, FLIPPED, Column

__all__ = ["Encoding"]


class Encoding:
    """Images to columns.

    Args:
        moments: of an autoencoder: images (n, 3, R, R) uint8 to the mean (n, C, h, w) of their posterior and its
            standard deviation, None of one that is deterministic. None stores pixels.
        encoders: tokens (n, T, D) of images, by name.
        flip: whether the mirror image is encoded as well; that of pixels is exact, and not stored.
        images: whether pixels are stored beside latents.
        dtype: of stored latents. Tokens are stored in float16.
        device: where the networks are.
    """

    def __init__(
        self,
        moments: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None,
        encoders: Mapping[str, Callable[[Tensor], Tensor]],
        *,
        flip: bool,
        images: bool,
        dtype: str,
        device: torch.device,
    ) -> None:
        self.moments, self.encoders, self.flip, self.images = moments, encoders, flip, images
        self.dtype, self.device = getattr(torch, dtype), device
        self.kind: Literal["moments", "mean", "images"] = "images"

    def columns(self, resolution: int, *, labels: bool) -> dict[str, Column]:
        """Return the columns of images of a resolution, by encoding a black one; the largest comes first."""
        blank = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8)
        columns = {name: Column.of(rows) for name, rows in self(blank).items()}
        number = Column(dtype="I64", shape=[])
        numbers = {"labels": number, "index": number} if labels else {"index": number}
        if self.moments is not None and self.images:  # bytes last, so that the others begin where their types may
            pixels = columns.pop("images")
            return {**columns, **numbers, "images": pixels}
        return {**columns, **numbers}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return columns of images (n, 3, R, R) uint8, on the host, as they are stored."""
        shown = send(images, self.device)
        sides = {"": shown, FLIPPED: shown.flip(3)} if self.flip else {"": shown}
        found: dict[str, Tensor] = {}
        if self.moments is None:
            found["images"] = images
        else:
            for end, side in sides.items():
                found |= {name + end: values.to(self.dtype).cpu() for name, values in self._latents(side).items()}
        for name, encoder in self.encoders.items():
            for end, side in sides.items():
                found[FEATURES + name + end] = encoder(side).half().cpu()
        return {**found, "images": images} if self.images else found

    def _latents(self, shown: Tensor) -> dict[str, Tensor]:
        assert self.moments is not None
        mean, std = self.moments(shown)
        self.kind = "mean" if std is None else "moments"
        return {"latents": mean} if std is None else {"moments": torch.cat((mean, std), 1)}

    def checked(self, images: Tensor) -> tuple[dict[str, Tensor], dict[int, str]]:
        """Return columns of the images that can be stored; and of each other one, by its place, why it cannot."""
        wrong = {}
        try:
            columns = self(images)
        except InputError:  # of a network in half precision, which does not say of which image
            wrong = {place: said for place in range(len(images)) if (said := self._refusal(images[place : place + 1]))}
            if not wrong:
                raise
            columns = self(images[_others(wrong, len(images))])
        kept = _others(wrong, len(images))
        for name, rows in columns.items():
            if rows.is_floating_point():
                lost = (~rows.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
                wrong |= {kept[place]: f"{name} that {str(rows.dtype)[6:]} cannot hold" for place in lost}
        places = [place for place, number in enumerate(kept) if number not in wrong]
        return {name: rows[places] for name, rows in columns.items()}, wrong

    def _refusal(self, image: Tensor) -> str | None:
        """Return what is said of an image (1, 3, R, R) that cannot be encoded; None if it can."""
        try:
            self(image)
        except InputError as error:
            return str(error)
        return None


def _others(wrong: Collection[int], count: int) -> list[int]:
    return [place for place in range(count) if place not in wrong]
