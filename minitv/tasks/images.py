"""Images: the pixels of small images, predicted one after the other.

An image of H rows and W columns is a sequence of H W grey levels. A sign that no pixel has stands before it, so that every
pixel is predicted, the first one too: what a model reads at place t is pixel t - 1, and what it is asked for is pixel t. The
model is not told which digit an image shows. --context must be at least H W, so that a pixel can depend on all before it.

The loss is the mean of -ln p of the right levels. The metric is the same in bits, -log₂ p: how many bits a pixel takes if the
images are stored with the model's probabilities. Fewer are better.

The order of the pixels (--scan):

    raster       row after row, as one reads            0  1  2  3
                                                        4  5  6  7
    patch        square after square, and inside each   0  1  4  5
                 row after row, --patch-side 2          2  3  6  7

The order matters to a model that cuts a sequence into patches. With squares of 2 by 2 pixels, MEGABYTE's --patch 4 is a square
of the image; in the raster with 8 columns --patch 8 is a row.

Without --data every step draws new digits: each is a line through given points, which are moved, slanted and turned, and each
line has its own thickness, see ``digits``. They have 8 rows of 8 pixels with 16 levels, if no option says otherwise. The
held-out ones are always the same. Of images in a file, the last fifth is held out.

Baselines count in the training images, as minitv/ngram.py does. They estimate the probability of a level in five ways: all
levels are alike (uniform); by how often it occurs in all pixels; by how often at this place; by how often at this place beside
the same left neighbour; and the same with the upper neighbour. Both neighbours come before a pixel in both orders, so that no
baseline knows what a model does not. A model is useful below what the better neighbour gives: 2.24 bits per pixel of
scikit-learn's digits, and 2.45 of those that are drawn.

    minitv train transformer --task images                             digits that are drawn; a position for each of 64 pixels
    minitv train megabyte --task images --scan patch --patch 4         patches that are squares
    minitv train transformer --task images --data digits               those of scikit-learn, or a folder of PNG files
    minitv sample DIR --count 25 --complete 0.5 --out digits.png       completes images that were held out; without --complete
                                                                       it makes up whole ones
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autograd.random import Random

from ..config import check, option
from ..corpus import COUNTED
from ..data import Batches
from ..errors import UserError, naming
from ..images import as_text, grid, read_images, write_png
from ..ngram import after
from ..options import DATA, STEPS
from ..report import count
from ..sample import written
from ..task import Batch
from ._drawn import HELD_OUT, check_drawn
from ._media import Media, digest

COUNTING = Random(3).split(2**63)  # the source of the drawn images that the baselines count
DRAWN_LEVELS, COUNTED_DRAWN = 16, 5000
TRAINING = 0.8  # the share of images in a file
SHOWN = 100  # characters in a line of images on the screen
WRITTEN = 16  # images in a picture of them

# The strokes of a digit as points (right, down) in a square of side 1, joined by straight lines. Some repeat their last point.
STROKES = np.array([
    [(.5, .1), (.3, .2), (.22, .5), (.3, .8), (.5, .9), (.7, .8), (.78, .5), (.7, .2), (.5, .1), (.5, .1)],
    [(.32, .28), (.52, .1), (.52, .9), (.52, .9), (.52, .9), (.52, .9), (.52, .9), (.52, .9), (.52, .9), (.52, .9)],
    [(.22, .3), (.32, .14), (.52, .09), (.72, .18), (.74, .36), (.6, .55), (.22, .9), (.8, .9), (.8, .9), (.8, .9)],
    [(.24, .15), (.6, .1), (.75, .27), (.62, .45), (.42, .49), (.66, .54), (.78, .7), (.6, .9), (.22, .86), (.22, .86)],
    [(.62, .92), (.62, .1), (.2, .66), (.84, .66), (.84, .66), (.84, .66), (.84, .66), (.84, .66), (.84, .66), (.84, .66)],
    [(.76, .1), (.32, .1), (.26, .45), (.58, .42), (.77, .56), (.76, .76), (.58, .9), (.22, .86), (.22, .86), (.22, .86)],
    [(.68, .1), (.4, .28), (.25, .6), (.32, .83), (.52, .91), (.72, .8), (.73, .6), (.52, .5), (.27, .64), (.27, .64)],
    [(.2, .11), (.8, .11), (.6, .5), (.42, .9), (.42, .9), (.42, .9), (.42, .9), (.42, .9), (.42, .9), (.42, .9)],
    [(.5, .48), (.28, .29), (.5, .1), (.72, .29), (.5, .48), (.25, .7), (.5, .9), (.75, .7), (.5, .48), (.5, .48)],
    [(.74, .36), (.5, .5), (.27, .34), (.36, .14), (.6, .1), (.74, .24), (.74, .36), (.68, .7), (.5, .9), (.5, .9)],
])  # [10 points 2]


@dataclass(frozen=True)
class ImagesOptions:
    """images"""

    data: str = option(
        "", "images of one size: digits (those of scikit-learn), a file .npy or .npz of integers from 0 to 255 [N H W], or a "
        "folder of PNG files; without it, digits that are drawn anew at every step. The last fifth of a file is held out",
        metavar="PATH", group=DATA, resumable=True, harmless=True,
    )
    side: int = option(8, "rows and columns of the digits that are drawn", low=4, high=128)
    noise: float = option(0.02, "standard deviation of the noise in the digits that are drawn; white is 1", low=0, high=1)
    levels: int | None = option(None, "grey levels to which pixels are rounded down; none = 16 for digits that are drawn, else "
                                "as many as the images have", low=2, high=256)
    scan: str = option("raster", "the order of the pixels: row after row of the image, or of one square after the other",
                       choices=("raster", "patch"))
    patch_side: int = option(2, "rows and columns of the squares of --scan patch", low=1, high=1024)
    eval_examples: int = option(1000, "held-out images read at an evaluation, at most", low=1, high=2**20, group=STEPS,
                               resumable=True)

    def __post_init__(self) -> None:
        check(self)
        if self.scan != "patch" and self.patch_side != 2:
            raise UserError(f"--patch-side: this concerns --scan patch, and --scan is {self.scan}")


class Images(Media, name="images", summary="the pixels of small images, one after the other"):
    """Grey levels as ids, and one more for the sign that stands before each image."""

    Options = ImagesOptions
    defaults = {"batch": 32, "steps": 1000, "eval_every": 250}  # noqa: RUF012
    metric, unit, key = "bits per pixel", "bits/pixel", "bpp"
    after = "draw images with: minitv sample {directory}"
    writes, suffix = ("out", "complete"), ".png"

    def __init__(self, options: ImagesOptions, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        self.options, self._count, self._random = options, batch, Random(seed)
        self._images: tuple[np.ndarray, np.ndarray] | None = None  # for training and held out, where they are not drawn
        if saved is None:
            check_drawn(options, "digits that are drawn", "side", "noise")
        if options.data:
            with naming("--data"):
                source = read_images(options.data)
            pixels, depth, self.description, self.notes, self.sha256 = *source, digest(source.pixels)
            if saved is not None and "depth" in (form := self.stored_form(saved)) and depth <= form["depth"]:
                depth = form["depth"]  # the brightest level need not be in these images
            self.description += f": {count(len(pixels))} image{'s' * (len(pixels) != 1)}"
        else:
            pixels, depth, self.notes, self.sha256 = None, options.levels or DRAWN_LEVELS, [], ""
            self.description = "digits that are drawn"
        levels = options.levels or depth
        if levels > depth:
            raise UserError(f"--levels: {levels} is more than the images have, allowed: 2 to {depth}")
        height, width = (options.side, options.side) if pixels is None else pixels.shape[1:]
        self.form = {"rows": height, "columns": width, "levels": levels, "depth": depth}
        self.vocab = levels + 1
        self.check_same(saved)
        self.order = scan(height, width, options)
        if height * width > context:
            raise UserError(f"--context: an image has {height} · {width} = {height * width} pixels, and the model sees "
                            f"{context} at once: give --context {height * width}, or smaller images")
        if pixels is not None:
            pixels = (pixels.astype(np.int64) * levels // depth).astype(np.uint8)
            self._whole = self.holds_out_all(saved)
            cut = 0 if self._whole else int(TRAINING * len(pixels))
            if saved is None and not 0 < cut < len(pixels):
                raise UserError(f"--data: {self.description}, allowed: at least 2, since a fifth is held out")
            self._images = pixels[:cut], pixels[cut:]
            self._places = Batches(np.arange(cut + 1), batch, 1, seed) if cut else None  # each image once, in random order

    def draw(self, random: Random, count: int) -> np.ndarray:
        """Digits [N H W] that follow from the source alone."""
        return digits(random, count, self.form["rows"], self.form["levels"], self.options.noise)

    def sequences(self, pixels: np.ndarray) -> Batch:
        """What is read and what is asked for, of images [N H W]: T = H W values of each."""
        labels = pixels.reshape(len(pixels), -1)[:, self.order].astype(np.int64)  # [N T]
        return Batch(np.concatenate([np.full((len(labels), 1), self.form["levels"]), labels[:, :-1]], axis=1), labels)

    def word(self, token: int) -> str:
        return "start" if token == self.form["levels"] else str(token)

    def batch(self, step: int) -> Batch:
        if self._images is None:
            return self.sequences(self.draw(self._random.split(step), self._count))
        return self.sequences(self._images[0][self._places.batch(step)[0][:, 0]])

    def held_out(self) -> Batch:
        return self.sequences(self.held_out_images)

    @functools.cached_property
    def held_out_images(self) -> np.ndarray:
        """The images [N H W] that an evaluation reads."""
        if self._images is None:
            return self.draw(HELD_OUT, self.options.eval_examples)
        return self._images[1][: None if self._whole else self.options.eval_examples]

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """Bits per held-out pixel of what counting knows of a pixel."""
        levels = self.form["levels"]
        training = self.draw(COUNTING, COUNTED_DRAWN) if self._images is None else self._images[0]
        result, test = {"uniform": math.log2(levels)}, self.held_out_images
        if not len(training):
            return result
        training = training[: max(1, COUNTED // training[0].size)]
        values, targets = (images.reshape(len(images), -1).astype(np.int64) for images in (training, test))  # [N P]
        places = np.arange(values.shape[1])

        def bits(p: np.ndarray) -> float:
            return float(-np.log2(p).mean())

        def estimate(context: np.ndarray, query: np.ndarray, below: Any) -> np.ndarray:
            return after(context.ravel(), values.ravel(), query.ravel(), targets.ravel(), levels, below)

        nothing, nothing_else = np.zeros_like(values), np.zeros_like(targets)
        alone = estimate(nothing, nothing_else, 1 / levels)
        here = estimate(nothing + places, nothing_else + places, alone)
        result |= {"all pixels": bits(alone), "pixels at its place": bits(here)}
        for name, axis in (("and the left one", 2), ("and the upper one", 1)):
            before = [places + len(places) * np.where(np.indices(images.shape)[axis] > 0, 1 + np.roll(images, 1, axis), 0)
                      .reshape(len(images), -1).astype(np.int64) for images in (training, test)]
            result[name] = bits(estimate(*before, here))
        return result

    def show(self, model: Any, rng: Random) -> str:
        """Images that the model makes up, as many as fit a line."""
        width = 2 * self.form["columns"]
        if width > SHOWN:
            return ""
        number = min(4, (SHOWN + 2) // (width + 2))
        pixels = draw_images(model, self.form, self.order, list(map(rng.split, range(number))))
        return as_text(pixels, self.form["levels"])

    @classmethod
    def write_file(cls, run: Any, options: Any, path: Path) -> str:
        form, of_task = cls.stored_form(run.saved), run.experiment.data
        order, number = scan(form["rows"], form["columns"], of_task), options.count or WRITTEN
        prefix, note = (), ""
        if options.complete is not None:
            task = run.experiment.begin(run.saved)
            size = max(1, int(options.complete * len(order)))
            prefix = task.sequences(task.held_out_images[:number]).labels[:, :size]  # [N size]
            if len(prefix) < number:
                raise UserError(f"--count: {number} images are to be completed, and {len(prefix)} are held out")
            note = f"; the first {size} of {len(order)} pixels are those of images that were held out"
        rngs = [Random(options.seed + i) for i in range(number)]
        pixels = draw_images(run.model, form, order, rngs, prefix, **options.drawing())
        write_png(path, grid(pixels, form["levels"]))
        return f"{number} image{'s' * (number != 1)} of {form['rows']} by {form['columns']} pixels{note}"


def scan(height: int, width: int, options: ImagesOptions) -> np.ndarray:
    """The pixels [T] in the order in which they are predicted, as numbers row by row; UserError if squares do not fit."""
    places = np.arange(height * width)
    if options.scan == "raster":
        return places
    side = options.patch_side
    if height % side or width % side:
        raise UserError(f"--patch-side: squares of {side} by {side} do not fill images of {height} by {width} pixels")
    return places.reshape(height // side, side, width // side, side).swapaxes(1, 2).reshape(-1)


def draw_images(model: Any, form: Mapping[str, int], order: np.ndarray, rngs: Sequence[Random], prefix: Any = (),
                **options: Any) -> np.ndarray:
    """Images [N H W] that a model makes up behind the pixels ``prefix`` [N n]; ``options`` are those of ``together``."""
    prefix = np.reshape(prefix, (len(rngs), -1)).astype(np.int64)
    prompts = np.insert(prefix, 0, form["levels"], axis=1)
    rest = written(model, prompts, len(order) - prefix.shape[1], rngs, among=form["levels"], **options)
    pixels = np.empty((len(rngs), len(order)), np.uint8)
    pixels[:, order] = np.concatenate([prefix, rest], axis=1)
    return pixels.reshape(-1, form["rows"], form["columns"])


def digits(random: Random, count: int, side: int, levels: int, noise: float) -> np.ndarray:
    """Digits uint8 [N side side], a function of the source alone: dark is 0, and the brightest stroke ``levels`` - 1.

    The points of a digit's strokes are moved a little, each by itself, and then stretched, slanted, turned and shifted
    together. A pixel is as bright as a line of the digit's thickness covers it.
    """
    shape = count, STROKES.shape[1], 2
    kind = random.split(0).integers(0, len(STROKES), (count,))
    points = STROKES[kind] - 0.5 + 0.025 * random.split(1).normal(shape, np.float64)  # [N points 2]
    stretch, slant, turn, thick = random.split(2).uniform((4, count, 1), np.float64)
    x, y = points[..., 0] * (0.75 + 0.35 * stretch), points[..., 1]
    x = x - y * (0.5 * slant - 0.15)
    angle = 0.5 * (turn - 0.5)
    shift = 0.5 + 0.08 * (random.split(3).uniform((2, count, 1), np.float64) - 0.5)
    x, y = x * np.cos(angle) - y * np.sin(angle) + shift[0], x * np.sin(angle) + y * np.cos(angle) + shift[1]  # [N points]
    centre = (np.arange(side) + 0.5) / side
    across, down = np.tile(centre, side), np.repeat(centre, side)  # of every pixel [P]
    nearest = np.full((count, side * side), np.inf)  # squared distance to the strokes [N P]
    for i in range(STROKES.shape[1] - 1):
        dx, dy = (end[:, i + 1, None] - end[:, i, None] for end in (x, y))  # [N 1]
        px, py = across - x[:, i, None], down - y[:, i, None]  # [N P]
        along = np.clip((px * dx + py * dy) / np.maximum(dx * dx + dy * dy, 1e-12), 0, 1)
        np.minimum(nearest, (px - along * dx) ** 2 + (py - along * dy) ** 2, out=nearest)
    ink = np.clip((0.05 + 0.06 * thick - np.sqrt(nearest)) * side + 0.5, 0, 1)
    ink = np.clip(ink + noise * random.split(4).normal(ink.shape, np.float64), 0, 1) if noise else ink
    return np.round(ink * (levels - 1)).astype(np.uint8).reshape(count, side, side)
