"""Images of one size as grey levels: from a package, an array in a file, or a folder of PNG files; and back to PNG."""

from __future__ import annotations

import math
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import files
from .errors import UserError
from .sources import rank

DIGITS = "digits"  # the name of scikit-learn's digits, as a source


class Images(NamedTuple):
    """Grey levels uint8 [N H W] from 0 to ``levels`` - 1, a few words about where they came from, and what was done to them."""

    pixels: np.ndarray
    levels: int
    description: str
    notes: list[str]


def read_images(source: str) -> Images:
    """The images of a source; UserError when it cannot be read, or they have several sizes or other values than 0 to 255.

    - ``"digits"``: the 1797 digits of 8 by 8 pixels and 17 levels that scikit-learn ships;
    - a file ``.npy`` or ``.npz`` of integers [N H W]; of several arrays in a file the one named images, or the only one with
      three axes. The levels are those from 0 to the largest number;
    - a folder: the PNG files in it and below, in the order of the SHA-256 of their names, with 256 levels. Colours become grey.
    """
    if source == DIGITS:
        return _digits()
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() not in (".npy", ".npz"):
        missing = "there is no such file or folder" if not path.exists() else "this is no source of images"
        raise UserError(f"{source}: {missing}, allowed: digits, a file .npy or .npz, a folder of PNG files")
    return _array(path)


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(f"{DIGITS}: these images come with scikit-learn: pip install scikit-learn") from None
    return Images(load_digits().images.astype(np.uint8), 17, "the digits of scikit-learn", [])


def _array(path: Path) -> Images:
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except Exception as error:  # what NumPy raises at bytes that are no array is of many kinds
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        if "pickle" in reason:  # it takes whatever it does not know for that, and would advise to trust it
            reason = "it is no file of NumPy, or one of other things than numbers"
        raise UserError(f"{path}: no array of numbers can be read: {reason}") from None
    fitting = [name for name, array in arrays.items() if array.ndim == 3]
    name = "images" if "images" in arrays else fitting[0] if len(fitting) == 1 else next(iter(arrays), None)
    if name is None or (len(arrays) > 1 and name not in ("images", *fitting)) or (len(fitting) > 1 and name != "images"):
        raise UserError(f"{path}: has the arrays {', '.join(arrays) or 'none'}, allowed: one [N H W], or one named images")
    pixels = arrays[name]
    if pixels.ndim != 3 or not pixels.size:
        raise UserError(f"{path}: the array has the shape {list(pixels.shape)}, allowed: [N H W], N images of H rows and W "
                        "columns")
    if pixels.dtype.kind not in "iub" or pixels.min() < 0 or pixels.max() > 255:
        what = (f"of the type {pixels.dtype}" if pixels.dtype.kind not in "iub" else
                f"from {pixels.min()} to {pixels.max()}")
        raise UserError(f"{path}: the numbers are {what}, allowed: integers from 0 to 255")
    pixels = pixels.astype(np.uint8)
    return Images(pixels, max(2, int(pixels.max()) + 1), str(path), [])


def _folder(root: Path) -> Images:
    try:
        from matplotlib.image import imread
    except ImportError:
        raise UserError(f"{root}: reading PNG files needs matplotlib: pip install matplotlib") from None
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()
             and not any(part.startswith(".") for part in path.relative_to(root).parts)]
    png = sorted((name for name in names if name.lower().endswith(".png")), key=rank)
    if not png:
        raise UserError(f"{root}: holds no PNG file")
    images, colourful = [], 0
    for name in png:
        try:
            image = imread(root / name)  # [H W], or [H W C] with colours, transparency or both
        except (OSError, SyntaxError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{root / name}: is no PNG file that can be read: {reason}") from None
        if image.ndim == 3:
            colourful += 1
            opaque = image[..., -1] if image.shape[2] in (2, 4) else 1.0
            grey = image[..., :3] @ np.array([0.299, 0.587, 0.114]) if image.shape[2] > 2 else image[..., 0]
            image = grey * opaque
        if images and image.shape != images[0].shape:
            raise UserError(f"{root}: {name} has {_size(image.shape)} pixels and {png[0]} has {_size(images[0].shape)}, "
                            "allowed: images of one size")
        images.append(np.round(image * 255).astype(np.uint8))
    notes = [f"the colours of {colourful} become grey, on black where they are transparent"] * bool(colourful)
    others = len(names) - len(png)
    notes += [f"left out: {others} that {'are' if others > 1 else 'is'} no PNG file{'s' * (others > 1)}"] * (others > 0)
    return Images(np.stack(images), 256, f"{root}, {len(png)} PNG files", notes)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} by {shape[1]}"


def grid(pixels: np.ndarray, levels: int) -> np.ndarray:
    """Images [N H W] side by side in rows, as one of 256 levels, enlarged by a whole number to about 64 pixels each."""
    count, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    scale, gap, rows = max(1, 64 // max(height, width)), 4, -(-count // columns)
    page = np.full((rows * (scale * height + gap) + gap, columns * (scale * width + gap) + gap), 96, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (gap + (i // columns) * (scale * height + gap), gap + (i % columns) * (scale * width + gap))
        bright = np.round(image * (255 / (levels - 1))).astype(np.uint8)
        page[top : top + scale * height, left : left + scale * width] = np.kron(bright, np.ones((scale, scale), np.uint8))
    return page


def write_png(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Write grey levels uint8 [H W] as a PNG file (ISO/IEC 15948); RunError when the disk refuses."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1).tobytes()  # each behind a 0: no filter
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    files.replace(Path(path), b"".join(parts))


def as_text(pixels: np.ndarray, levels: int) -> str:
    """Images [N H W] side by side as lines of characters, two for a pixel."""
    ramp = np.array(list(" .:-=+*#%@"))
    shades = ramp[pixels.astype(int) * (len(ramp) - 1) // (levels - 1)]  # [N H W]
    return "\n".join("  ".join("".join(np.repeat(row, 2)) for row in rows).rstrip() for rows in shades.swapaxes(0, 1))
