"""Images decoded once, into one array of bytes: Pillow reads, the model's image processor resizes and crops."""

from __future__ import annotations

import base64
import binascii
import io
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from .image_rows import Rows
from .usage import UsageError, one_line

try:
    from PIL import Image, ImageOps
except ImportError as error:
    raise ImportError("Pillow is not installed; pip install 'hf_lngd[vision]'") from error

logger = logging.get_logger(__name__)

Pixels = NDArray[np.uint8]

# What is larger lies in a file that is mapped into memory.
IN_MEMORY = 2**30
# Images that a message names.
NAMED = 5

_MODES = {1: "L", 3: "RGB"}


def decode(rows: Rows, processor: Any, channels: int, skip_corrupt: bool) -> tuple[Pixels, NDArray[np.int64], Any]:
    """All images as bytes, of one size.

    Images of another mode than the model's are converted, and counted in one warning.

    Args:
        rows: the images.
        processor: whose size, resampling and cropping are used.
        channels: of the model: 3 or 1.
        skip_corrupt: leave out what cannot be read, with one warning that names it, in place of an error.

    Returns:
        Bytes [N, C, H, W], the numbers of the rows that they are [N], and the folder of the file that they lie in
        (to be kept as long as they), None if they are in memory.

    Raises:
        UsageError: an image that cannot be read, is of another size than the first; none that can be read.
    """
    pixels: Pixels | None = None
    folder: Any = None
    kept: list[int] = []
    corrupt: list[str] = []
    modes: Counter[str] = Counter()
    # A bar for what takes longer; closed before anything is raised, so that the error has a line of its own.
    with logging.tqdm(rows, desc=f"Images of {rows.origin}", delay=2) as bar:
        for index, value in enumerate(bar):
            try:
                image, mode = in_mode(read_image(value, rows.base), channels)
            except Exception as error:  # Pillow's decoders raise whatever their format leads them to
                where = rows.where(index)
                if not skip_corrupt:
                    message = f"{where}: cannot be read as an image ({one_line(error, 200)}); --skip_corrupt_images"
                    raise UsageError(rows.argument, f"{message} true leaves such images out") from error
                corrupt.append(where)
                continue
            if mode:
                modes[mode] += 1
            resized = resize(image, processor)
            if pixels is None:
                pixels, folder = _allocate((len(rows), *resized.shape))
            if resized.shape != pixels.shape[1:]:
                size = f"got {list(resized.shape)} after the image processor, the first has {list(pixels.shape[1:])}"
                raise UsageError("image_size", f"{rows.where(index)}: {size}, accepted: one size for all")
            pixels[len(kept)] = resized
            kept.append(index)
    _tell(rows, corrupt, modes, channels)
    if pixels is None:
        raise UsageError(rows.argument, f"{rows.origin}: none of {len(rows)} images can be read")
    return pixels[: len(kept)], np.array(kept, dtype=np.int64), folder


def _tell(rows: Rows, corrupt: list[str], modes: Counter[str], channels: int) -> None:
    if corrupt:
        named = ", ".join(corrupt[:NAMED]) + (", …" if len(corrupt) > NAMED else "")
        logger.warning(f"{rows.origin}: {len(corrupt)} of {len(rows)} images cannot be read and are left out: {named}")
    if modes:
        counts = ", ".join(f"{count} of {mode}" for mode, count in sorted(modes.items()))
        logger.warning(f"{rows.origin}: {sum(modes.values())} images are converted to {_MODES[channels]}: {counts}")


def _allocate(shape: tuple[int, ...]) -> tuple[Pixels, Any]:
    if int(np.prod(shape, dtype=np.int64)) <= IN_MEMORY:
        return np.empty(shape, np.uint8), None
    folder = tempfile.TemporaryDirectory(prefix="hf_lngd-images-", ignore_cleanup_errors=True)
    path = Path(folder.name) / "pixels.npy"
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape), folder


def read_image(value: Any, base: Path) -> Image.Image:
    """An image from ``{bytes, path}``, bytes, a path (relative ones from `base`), or pixels [H, W] or [H, W, C].

    Raises:
        Exception: what Pillow raises for a broken file; ValueError for pixels of another shape or range.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and not (base / value).is_file():
            value = _from_base64(value)
    if isinstance(value, str):
        value = base / value
    if isinstance(value, bytes):
        value = io.BytesIO(value)
    if isinstance(value, (Path, io.BytesIO)):
        with Image.open(value) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    if value is None:
        raise ValueError("no image")
    return _from_pixels(np.asarray(value))


def _from_base64(text: str) -> Any:
    """Bytes of an image as JSON carries them; what is no base64 is a path."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return text


def _from_pixels(pixels: NDArray[Any]) -> Image.Image:
    """From whole numbers in [0, 255] or fractions in [0, 1]."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == object or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(f"got pixels {list(pixels.shape)}, accepted: [H, W] or [H, W, C] with C of 1, 3, 4")
    if not pixels.size or not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("got pixels outside [0, 255], accepted: whole numbers in [0, 255] or fractions in [0, 1]")
    if pixels.dtype.kind == "f" and pixels.max() <= 1:
        pixels = pixels * 255
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def in_mode(image: Image.Image, channels: int) -> tuple[Image.Image, str | None]:
    """The image with the model's channels, and its mode if that was another; 16 bits become 8."""
    mode, wanted = image.mode, _MODES[channels]
    if mode == wanted:
        return image, None
    if mode.startswith("I"):  # Pillow would cut at 255
        wide = np.asarray(image).astype(np.int64)
        is_wide = mode != "I" or wide.max(initial=0) > 255
        image = Image.fromarray(np.clip(wide >> 8 if is_wide else wide, 0, 255).astype(np.uint8))
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # which Pillow asks for
    return image.convert(wanted), mode


def resize(image: Image.Image, processor: Any) -> Pixels:
    """What the processor makes of an image before it rescales and normalises: bytes [C, H, W]."""
    made = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return np.clip(np.rint(made), 0, 255).astype(np.uint8) if made.dtype != np.uint8 else made
