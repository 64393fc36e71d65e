"""Images of a source, decoded and cropped in threads ahead of what encodes them.

R side of an image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathline.core.draws import Draws
from pathline.core.errors import PathlineError
from pathline.data.crop import centre_crop
from pathline.data.sources import ImageSource

__all__ = ["Decoder", "chosen_images"]


def chosen_images(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Return the numbers of the images to prepare, in order: all, or ``limit`` of them, drawn by the seed."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(Draws(seed).permutation("prepared images", count)[:limit])


class Decoder:
    """Images by number, read by threads, some of them ahead.

    Args:
        source: of the images.
        resolution: R.
        ahead: images read before they are asked for.
        threads: that read.
    """

    def __init__(self, source: ImageSource, resolution: int, *, ahead: int, threads: int) -> None:
        self.source, self.resolution, self.ahead = source, resolution, ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def groups(self, numbers: Sequence[int], size: int) -> Iterator[tuple[list[int], list[Tensor | PathlineError]]]:
        """Yield ``size`` images after ``size``: their numbers, and each (3, R, R) uint8, or why it cannot be read."""
        waiting: deque[Future[Tensor | PathlineError]] = deque()
        try:
            sent = 0
            for first in range(0, len(numbers), size):
                group = list(numbers[first : first + size])
                end = min(first + len(group) + self.ahead, len(numbers))
                waiting.extend(self._pool.submit(self._read, number) for number in numbers[sent:end])
                sent = end
                yield group, [waiting.popleft().result() for _ in group]
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _read(self, number: int) -> Tensor | PathlineError:
        try:
            image = centre_crop(self.source.read(number), self.resolution)
        except PathlineError as error:
            return error
        return torch.from_numpy(image).permute(2, 0, 1).contiguous()
