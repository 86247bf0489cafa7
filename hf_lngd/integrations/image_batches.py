"""Batches of images: chosen, shifted and mirrored as bytes, then normalised, whole batches at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

Batch = dict[str, Tensor]


class ImageSet(Dataset[Batch]):
    """Images [N, C, H, W] as bytes with labels [N]; augmented if asked to.

    How an image is shifted and mirrored depends on seed, epoch and the image's number alone. Not on torch's random
    state: a data loader reads ahead, so that state is another one when a run is resumed. So a resumed run sees the
    same pixels, with any number of workers.

    Args:
        pixels: bytes [N, C, H, W].
        labels: class numbers [N], or None.
        augment: none, crop, flip or crop_flip.
        seed: of the augmentation.
        keep: whatever `pixels` need to live.
    """

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64] | None = None,
        augment: str = "none",
        seed: int = 0,
        keep: Any = None,
    ) -> None:
        self.pixels, self.augment, self.seed, self._keep = pixels, augment, seed, keep
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.pad = max(1, round(max(pixels.shape[-2:]) / 8))  # 4 at 32 × 32
        # Shared with the processes of a data loader, which may outlive an epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._draw(0)

    def begin_epoch(self, epoch: int) -> None:
        """Shifts and mirrorings of this epoch from here on."""
        self._epoch.fill_(int(epoch))
        self._draw(int(epoch))

    def _draw(self, epoch: int) -> None:
        self._drawn = epoch
        draw, count = np.random.default_rng([self.seed, epoch]), len(self)
        shifts = draw.integers(0, 2 * self.pad + 1, (count, 2), dtype=np.int16)
        self.shifts = shifts if "crop" in self.augment else np.full_like(shifts, self.pad)
        mirrored = draw.integers(0, 2, count, dtype=np.int8).astype(bool)
        self.mirrored = mirrored if "flip" in self.augment else np.zeros_like(mirrored)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Batch:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch, which torch's data loader asks for where it can: bytes [B, C, H, W], labels [B]."""
        chosen = np.asarray(indices)
        pixels = torch.from_numpy(self.pixels[chosen])
        if self.augment != "none":
            if self._drawn != int(self._epoch):
                self._draw(int(self._epoch))
            pixels = shift(pixels, torch.from_numpy(self.shifts[chosen]).long(), self.pad)
            if "flip" in self.augment:
                mirrored = torch.from_numpy(self.mirrored[chosen])
                pixels[mirrored] = pixels[mirrored].flip(-1)
        batch = {"pixel_values": pixels}
        if self.labels is not None:
            batch["labels"] = self.labels[torch.from_numpy(chosen)]
        return batch


class TellEpoch(TrainerCallback):
    """Tells the training images which epoch begins.

    accelerate's loaders do so (``set_epoch``) only as long as no batches are skipped and there is one process: a
    resumed run would see the pixels of the first epoch.
    """

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`state.epoch` has a fraction where a run is resumed within an epoch."""
        self.images.begin_epoch(int(state.epoch or 0))


def shift(pixels: Tensor, corners: Tensor, pad: int) -> Tensor:
    """Windows of images with a black border, each at its own place.

    Args:
        pixels: [B, C, H, W].
        corners: [B, 2], row and column of each window in the bordered image, from 0 to 2·pad; `pad`: no shift.
        pad: width of the border.

    Returns:
        [B, C, H, W]
    """
    height, width = pixels.shape[-2:]
    bordered = torch.nn.functional.pad(pixels, (pad,) * 4)
    windows = bordered.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, 2·pad+1, 2·pad+1, H, W]
    return windows[torch.arange(len(pixels)), :, corners[:, 0], corners[:, 1]]


class Normalise:
    """The collator: bytes to what the model expects, ``scale · bytes + offset`` for each channel.

    Both are read off what the image processor makes of black and white, so that training and use agree.

    Args:
        processor: of the model.
        shape: of an image, [C, H, W].
    """

    def __init__(self, processor: Any, shape: Sequence[int]) -> None:
        channels, height, width = shape
        side = max(height, width) * 2  # larger than any crop
        ends = [np.full((side, side, channels), value, np.uint8) for value in (0, 255)]
        made = processor(ends, return_tensors="pt", input_data_format="channels_last")["pixel_values"].float()
        black, white = made[:, :, made.shape[2] // 2, made.shape[3] // 2].unsqueeze(-1).unsqueeze(-1)
        self.scale, self.offset = (white - black) / 255, black

    def __call__(self, batch: Batch | list[Batch]) -> Batch:
        """`pixel_values` [B, C, H, W] as floats; the rest as it is."""
        if isinstance(batch, list):
            batch = {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}
        return {**batch, "pixel_values": batch["pixel_values"].float().mul_(self.scale).add_(self.offset)}
