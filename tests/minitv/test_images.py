"""Images: where they come from, the order of their pixels, the baselines, and what a trained model draws."""

from __future__ import annotations

import math
import struct
import sys
import zlib
from collections import Counter

import numpy as np
import pytest

from autograd.random import Random
from minitv import cli
from minitv.errors import UserError
from minitv.images import as_text, grid, read_images, write_png
from minitv.sample import load
from minitv.tasks.images import Images, digits, scan

SMALL = ["--layers", "2", "--width", "8", "--heads", "2", "--batch", "2", "--threads", "1", "--warmup", "1", "--steps", "2",
         "--eval-every", "2"]


def task(context: int = 64, batch: int = 4, seed: int = 0, saved=None, **values) -> Images:
    return Images(Images.Options(**values), context, batch, seed, saved)


@pytest.fixture
def file(tmp_path):
    """Saves an array and gives the name of the file."""
    def save(pixels, name="a.npy", **named):
        path = tmp_path / name
        np.savez(path, **named) if named else np.save(path, pixels)
        return str(path)

    return save


def some(count=10, rows=4, columns=4, top=7, seed=0, dtype=np.uint8):
    pixels = np.random.default_rng(seed).integers(0, top + 1, (count, rows, columns))
    pixels[0, 0, 0] = top
    return pixels.astype(dtype)


# -- sequences -----------------------------------------------------------------------------------------------------------
def test_pixels_are_read_in_the_order_that_is_asked_for():
    options = Images.Options
    assert scan(2, 3, options()).tolist() == list(range(6))
    assert scan(4, 6, options(scan="patch")).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11,
                                                          12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    assert scan(8, 8, options(scan="patch", patch_side=8)).tolist() == list(range(64))
    with pytest.raises(UserError, match="--patch-side: squares of 3 by 3 do not fill images of 4 by 6 pixels"):
        scan(4, 6, options(scan="patch", patch_side=3))


@pytest.mark.parametrize("values", [{}, {"scan": "patch"}, {"scan": "patch", "patch_side": 4}])
def test_every_pixel_is_asked_for_and_only_those_before_it_are_read(values):
    t = task(**values)
    pixels = some(3, 8, 8, 15)
    inputs, labels = t.sequences(pixels)
    assert (inputs[:, 0] == 16).all() and np.array_equal(inputs[:, 1:], labels[:, :-1]) and t.vocab == 17
    assert np.array_equal(labels, pixels.reshape(3, 64)[:, t.order]) and sorted(t.order.tolist()) == list(range(64))


def test_no_pixel_is_left_out_of_the_loss():
    """Level 0 is a pixel like others."""
    class Even:
        def __call__(self, ids, rng=None):
            from autograd import Tensor
            return Tensor(np.zeros((*ids.shape, 17)))

    t = task()
    sums = t.score(Even(), t.sequences(np.zeros((3, 8, 8), np.uint8)))
    assert sums[1] == 3 * 64 and abs(t.value(sums) - math.log2(17)) < 1e-12


def test_the_sign_before_an_image_is_no_grey_level():
    images = task(levels=4)
    assert [images.word(token) for token in images.batch(0).inputs[0, :1].tolist()] == ["start"]
    assert [images.word(level) for level in range(5)] == ["0", "1", "2", "3", "start"]


def test_a_batch_follows_from_the_seed_and_the_step():
    one, same, other = task(seed=4), task(seed=4), task(seed=5)
    one.batch(0)
    assert all(np.array_equal(a, b) for a, b in zip(one.batch(9), same.batch(9), strict=True))
    assert not np.array_equal(one.batch(9).labels, one.batch(8).labels)
    assert not np.array_equal(one.batch(9).labels, other.batch(9).labels)
    assert np.array_equal(one.held_out().labels, other.held_out().labels) and len(one.held_out().labels) == 1000
    rows = {row.tobytes() for step in range(50) for row in one.batch(step).labels}
    assert len(rows) == 200 and not rows & {row.tobytes() for row in one.held_out().labels}


def test_drawn_digits_look_like_themselves():
    """The nearest mean of a digit is its own; brightness has all levels, and more of them with a larger side."""
    learned, held = Random(7), Random(8)
    kinds = [source.split(0).integers(0, 10, (1000,)) for source in (learned, held)]
    pixels = [digits(source, 1000, 8, 16, 0.02).reshape(1000, 64).astype(float) for source in (learned, held)]
    means = np.stack([pixels[0][kinds[0] == kind].mean(axis=0) for kind in range(10)])
    nearest = ((pixels[1][:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == kinds[1]).mean() > 0.75
    assert set(np.unique(pixels[0])) == set(range(16))
    large = digits(learned, 10, 24, 256, 0.0)
    assert large.shape == (10, 24, 24) and large.max() == 255
    small = large.reshape(10, 8, 3, 8, 3).mean(axis=(2, 4)) / 255  # the same strokes
    assert np.abs(small - digits(learned, 10, 8, 256, 0.0) / 255).mean() < 0.08


# -- files ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.int8])
def test_an_array_of_any_integers_is_read(file, dtype):
    pixels = some(dtype=dtype)
    found = read_images(file(pixels))
    assert np.array_equal(found.pixels, pixels) and found.pixels.dtype == np.uint8 and found.levels == 8
    labels = np.arange(10)
    assert np.array_equal(read_images(file(None, "b.npz", labels=labels, x=pixels)).pixels, pixels)
    assert np.array_equal(read_images(file(None, "c.npz", x=pixels + 1, images=pixels)).pixels, pixels)


def test_the_last_fifth_is_held_out_and_a_pass_sees_every_other_image_once(file):
    pixels = some(25)
    t = task(16, batch=5, data=file(pixels))
    assert np.array_equal(t.held_out().labels, pixels[20:].reshape(5, 16)) and t.vocab == 9
    for first in (0, 4):
        rows = np.concatenate([t.batch(step).labels for step in range(first, first + 4)])
        assert Counter(map(bytes, rows.astype(np.uint8))) == Counter(map(bytes, pixels[:20].reshape(20, 16)))
    assert not np.array_equal(t.batch(0).labels, t.batch(4).labels)
    assert len(task(16, data=file(pixels), eval_examples=3).held_out().labels) == 3


def test_levels_are_rounded_down(file):
    t = task(16, data=file(some(top=255)), levels=4)
    assert t.vocab == 5 and np.array_equal(t._images[0], some(top=255)[:8] // 64)
    with pytest.raises(UserError, match="--levels: 9 is more than the images have, allowed: 2 to 8"):
        task(16, data=file(some()), levels=9)


@pytest.mark.parametrize(("pixels", "sentence"), [
    (some(dtype=np.float64), "the numbers are of the type float64, allowed: integers from 0 to 255"),
    (some(top=256, dtype=np.int64), "the numbers are from 0 to 256, allowed: integers from 0 to 255"),
    (-some(dtype=np.int64), "the numbers are from -7 to 0, allowed"),
    (some()[0], "the array has the shape [4, 4], allowed: [N H W]"),
    (np.zeros((3, 0, 4), np.uint8), "the array has the shape [3, 0, 4], allowed: [N H W]"),
    (some()[:, :, :, None], "the array has the shape [10, 4, 4, 1], allowed: [N H W]"),
    (some()[:1], "1 image, allowed: at least 2"),
    (some(rows=5), "--context: an image has 5 · 4 = 20 pixels, and the model sees 16 at once: give --context 20"),
    (np.array(["a"]), "allowed"),
], ids=lambda value: "" if isinstance(value, np.ndarray) else value[:30])
def test_arrays_that_are_no_images_are_sentences(file, pixels, sentence):
    with pytest.raises(UserError) as error:
        task(16, data=file(pixels))
    assert sentence in str(error.value) and str(error.value).startswith("--")


def test_sources_that_are_none_are_sentences(tmp_path, file, monkeypatch):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY this is cut")
    (tmp_path / "b.npz").write_bytes(b"PK no archive")
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "d.txt").write_text("text")
    (tmp_path / "g.npy").write_text("text")
    head = "{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999, 9, 9), }"  # of more numbers than there is memory
    (tmp_path / "h.npy").write_bytes(b"\x93NUMPY\x01\0" + len(head).to_bytes(2, "little") + head.encode())
    for name, sentence in (("a.npy", "no array of numbers can be read"), ("b.npz", "no array of numbers can be read"),
                           ("c.npy", "can be read: it is no file of NumPy, or one of other things than numbers"),
                           ("d.txt", "this is no source of images, allowed: digits, a file .npy or .npz, a folder"),
                           ("e.png", "there is no such file or folder"), ("f.npy", "can be read: No such file"),
                           ("g.npy", "can be read: it is no file of NumPy"), ("h.npy", "can be read: ")):
        with pytest.raises(UserError, match=sentence):
            read_images(str(tmp_path / name))
    two = file(None, "two.npz", a=some(), b=some())
    with pytest.raises(UserError, match="has the arrays a, b, allowed: one"):
        read_images(two)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"^--data: digits: these images come with scikit-learn: pip install scikit-learn$"):
        task(data="digits")
    monkeypatch.setitem(sys.modules, "matplotlib.image", None)
    with pytest.raises(UserError, match="reading PNG files needs matplotlib: pip install matplotlib"):
        read_images(str(tmp_path))


def test_the_digits_of_scikit_learn_have_the_known_baselines():
    pytest.importorskip("sklearn")
    t = task(data="digits")
    assert len(t._images[0]) == 1437 and len(t.held_out().labels) == 360 and t.vocab == 18
    bits = t.baselines
    assert abs(bits["uniform"] - 4.087) < 1e-3 and abs(bits["all pixels"] - 2.945) < 0.01
    assert abs(bits["pixels at its place"] - 2.391) < 0.03 and abs(bits["and the left one"] - 2.273) < 0.05
    assert abs(bits["and the upper one"] - 2.277) < 0.05


def test_a_folder_of_png_files_is_read(tmp_path):
    imsave = pytest.importorskip("matplotlib.image").imsave
    with pytest.raises(UserError, match="holds no PNG file"):
        read_images(str(tmp_path))
    pixels = some(5, 3, 6, 255)
    for i, image in enumerate(pixels):
        write_png(tmp_path / f"{i}.png", image)
    (tmp_path / "notes.txt").write_text("hidden numbers")
    found = read_images(str(tmp_path))
    assert found.levels == 256 and found.notes == ["left out: 1 that is no PNG file"]
    assert sorted(image.tobytes() for image in found.pixels) == sorted(image.tobytes() for image in pixels)

    imsave(tmp_path / "5.png", np.stack([pixels[0]] * 3, axis=2))  # grey, as colours
    found = read_images(str(tmp_path))
    assert found.notes[0] == "the colours of 1 become grey, on black where they are transparent"
    assert Counter(image.tobytes() for image in found.pixels)[pixels[0].tobytes()] == 2

    write_png(tmp_path / "6.png", some(1, 4, 6, 255)[0])
    with pytest.raises(UserError, match=r"png has \d by 6 pixels and .*png has \d by 6, allowed: images of one size"):
        read_images(str(tmp_path))
    (tmp_path / "6.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"6\.png: is no PNG file that can be read"):
        read_images(str(tmp_path))


def decoded(content):
    """The grey levels of a PNG file, by its definition."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        assert struct.unpack(">I", content[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + data)
        chunks[kind], place = data, place + 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any() and list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert chunks[b"IHDR"][8:] == bytes([8, 0, 0, 0, 0])
    return rows[:, 1:]


def test_a_picture_holds_the_images_side_by_side(tmp_path):
    pixels = some(5, 2, 3)
    page = grid(pixels, 8)
    write_png(tmp_path / "a.png", page)
    assert np.array_equal(decoded((tmp_path / "a.png").read_bytes()), page)
    scale, high, wide = 21, 2 * 21 + 4, 3 * 21 + 4
    for i, image in enumerate(pixels):  # three in a row
        top, left = 4 + i // 3 * high, 4 + i % 3 * wide
        part = page[top : top + 2 * scale, left : left + 3 * scale]
        assert np.array_equal(part[::scale, ::scale], np.round(image / 7 * 255)) and (part[:scale, :scale] == part[0, 0]).all()
    assert page.shape == (2 * high + 4, 3 * wide + 4)
    assert as_text(np.array([[[0, 7]], [[7, 0]]]), 8) == "  @@  @@"


# -- baselines -----------------------------------------------------------------------------------------------------------
def test_baselines_count_as_they_say(file):
    pixels = some(30, 3, 2, 3)
    t = task(6, data=file(pixels))
    learned, held = pixels[:24].tolist(), pixels[24:].tolist()

    def bits(context):
        """Witten-Bell estimates in the context of a pixel, its longer part first, pixel by pixel."""
        total = []
        for image in held:
            for r in range(3):
                for c in range(2):
                    p = 1 / 4
                    for known in context:
                        alike = [other[i][j] for other in learned for i in range(3) for j in range(2)
                                 if known(other, i, j) == known(image, r, c)]
                        kinds = len(set(alike))
                        p = (alike.count(image[r][c]) + kinds * p) / (len(alike) + kinds) if alike else p
                    total.append(-math.log2(p))
        return np.mean(total)

    def nothing(image, i, j):
        return 0

    def place(image, i, j):
        return i, j

    def left(image, i, j):
        return i, j, image[i][j - 1] if j else None

    def upper(image, i, j):
        return i, j, image[i - 1][j] if i else None

    expected = {"uniform": 2.0, "all pixels": bits([nothing]), "pixels at its place": bits([nothing, place]),
                "and the left one": bits([nothing, place, left]), "and the upper one": bits([nothing, place, upper])}
    assert list(t.baselines) == list(expected)
    for name, value in expected.items():
        assert abs(t.baselines[name] - value) < 1e-9, name


# -- a run ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "run"
    assert cli.main(["train", "megabyte", "--task", "images", "--patch", "8", "--scan", "patch", "--patch-side", "4",
                     "--eval-examples", "20", "--out", str(folder), *SMALL]) == 0
    return folder


def test_a_model_draws_a_picture_of_its_images(run, tmp_path, capsys):
    assert cli.main(["sample", str(run), "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"{run / 'sample.png'}: 16 images of 8 by 8 pixels\n"
    page = decoded((run / "sample.png").read_bytes())
    assert page.shape == (4 * 68 + 4, 4 * 68 + 4) and len(np.unique(page)) > 8
    out = tmp_path / "two.png"
    assert cli.main(["sample", str(run), "--seed", "4", "--count", "2", "--out", str(out)]) == 0
    assert np.array_equal(decoded(out.read_bytes())[4:68], page[4:68, 68 : 3 * 68 + 4])  # the seeds 4 and 5


def test_a_model_completes_what_was_held_out(run, tmp_path, capsys):
    out = tmp_path / "half.png"
    assert cli.main(["sample", str(run), "--count", "4", "--complete", "0.5", "--out", str(out)]) == 0
    assert "; the first 32 of 64 pixels are those of images that were held out" in capsys.readouterr().out
    held = task(eval_examples=20).held_out_images[:4]
    page, expected = decoded(out.read_bytes()), grid(held, 16)
    for top in (4, 72):
        for left in (4, 72):
            assert np.array_equal(page[top : top + 32, left : left + 64], expected[top : top + 32, left : left + 64])
    assert not np.array_equal(page, expected)


def test_the_smallest_share_is_a_pixel(run, tmp_path, capsys):
    assert cli.main(["sample", str(run), "--count", "1", "--complete", "0.001", "--out", str(tmp_path / "a.png")]) == 0
    assert "the first 1 of 64 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "sentence"), [
    (["sample", "--prompt", "a"], "--prompt: this says nothing to a model of the task images, allowed: --out, --complete"),
    (["sample", "--tokens", "9"], "--tokens: this says nothing to a model of the task images"),
    (["sample", "--seconds", "3"], "--seconds: this says nothing to a model of the task images"),
    (["sample", "--out", "a.jpg"], "--out a.jpg: a model of images writes a file that ends with .png"),
    (["sample", "--out", "nowhere/a.png"], "--out nowhere/a.png: there is no folder nowhere"),
    (["sample", "--complete", "1.5"], "--complete: 1.5 is too large, allowed: a number above 0 and below 1"),
    (["sample", "--complete", "0.5", "--count", "21"], "--count: 21 images are to be completed, and 20 are held out"),
    (["sample", "--window", "9"], "--window: this says nothing to a model of the task images"),
    (["eval", "--text", "a"], "--text: the task images has no text"),
    (["eval", "--encoding", "latin-1"], "--encoding: the data of the task images is no text file"),
    (["eval", "--data", "other.npy"], "--data: other.npy: 10 images has rows 4, and the model knows rows 8"),
    (["eval", "--data", "bright.npy"], "--data: bright.npy: 10 images has levels 100, and the model knows levels 16"),
])
def test_mistakes(run, tmp_path, monkeypatch, capsys, argv, sentence):
    monkeypatch.chdir(tmp_path)
    np.save("other.npy", some())
    np.save("bright.npy", some(10, 8, 8, 99))
    assert cli.main([argv[0], str(run), *argv[1:]]) == 2
    out, err = capsys.readouterr()
    assert not out and sentence in err and err.count("\n") == 1


def test_a_model_is_judged_by_what_is_held_out_and_by_other_images(run, tmp_path, capsys):
    assert cli.main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert "digits that are drawn, what is held out" in out and "1.3k values" in out and "bits per pixel, " in out
    line = next(line for line in (run / "log.jsonl").read_text().splitlines() if '"step": 2' in line)
    assert f"{float(line.split('val_bpp')[1].split(':')[1].split(',')[0]):.4f} bits per pixel" in out
    for number, values in ((3, "192 values"), (30, "1.9k values")):  # more than --eval-examples 20
        np.save(tmp_path / "other.npy", some(number, 8, 8, 10))
        assert cli.main(["eval", str(run), "--data", str(tmp_path / "other.npy"), "--strided"]) == 0
        out = capsys.readouterr().out
        assert f"{number} images, all of it" in out and f"{values}, in two passes" in out


def test_a_run_that_is_loaded_says_that_it_writes_files(run):
    with pytest.raises(UserError, match=r"^write: a model of the task images writes no text, it makes a file with `minitv sam"):
        load(str(run)).write()


@pytest.mark.parametrize(("values", "sentence"), [
    (dict(data="a.npy", side=9), "--side 9: this is for digits that are drawn, and --data gives other ones; allowed with --d"),
    (dict(data="a.npy", noise=0.5), "--noise 0.5: this is for digits that are drawn"),
    (dict(patch_side=4), "--patch-side: this concerns --scan patch, and --scan is raster")])
def test_options_that_would_do_nothing_are_refused(values, sentence):
    with pytest.raises(UserError, match=sentence):
        task(**values)


def test_a_run_goes_on_with_the_images_of_its_beginning_alone(file, tmp_path, capsys):
    name, out = file(some(10)), str(tmp_path / "run")
    assert cli.main(["train", "--task", "images", "--data", name, "--context", "16", "--out", out, *SMALL]) == 0
    assert cli.main(["train", "--resume", out, "--steps", "3"]) == 0
    capsys.readouterr()
    np.save(name, some(10, seed=1))
    assert cli.main(["train", "--resume", out, "--steps", "4"]) == 2
    assert "is not the data this run began with" in capsys.readouterr().err


def test_a_model_that_sees_both_sides_is_refused(capsys):
    assert cli.main(["train", "encoder", "--task", "images"]) == 2
    err = capsys.readouterr().err
    assert "--task images: encoder sees the whole sequence at once" in err and err.count("\n") == 1
