"""minitv explore: what any model mixes, and the page that shows it, also in a browser where there is one."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import minitv
import minitv.explore
from autograd import Tensor, matmul, op, softmax, use
from autograd.laws import linear_in
from autograd.random import Random
from autograd.registry import REGISTRY, operators_of
from autograd.state import watch
from minitv import variants
from minitv.cli import main
from minitv.evaluate import surprise
from minitv.explore.mixing import Call, mixings, record, without_matrix
from minitv.explore.mixing import Path as Way
from minitv.explore.mixing import linear_in as is_linear
from minitv.explore.page import LIMIT, library, page
from minitv.explore.study import study
from minitv.nn import Linear, Module, Parameter
from minitv.ops import attention
from minitv.options import ExploreOptions
from tests.conftest import full
from tests.minitv.browser import missing, prefer, show, start
from tests.minitv.models import build, logits_of

SMALL = dict(context=8, layers=1, width=8)
EVERY = list(variants.variants())
FEW = ["rwkv", "hyena", "simplified", "linformer", "linformer-segment", "megabyte", "one-wide-ffn", "conformer"]


def mixed(variant, length=8, **options):
    """A model whose weights are far from their first ones, and what it mixes of some ids."""
    model = build(variant, **{**SMALL, **options})
    for i, parameter in enumerate(model.parameters()):
        parameter.assign_(parameter.data + 0.3 * Random(i).normal(parameter.shape, np.float64))
    ids = Random(7).integers(0, 11, (1, length))
    with use(kernel="none"):  # as the page does it
        calls = record(lambda: logits_of(model, ids))
        found = mixings(calls, model)
    assert not without_matrix(calls, found)
    return found


@pytest.mark.parametrize("variant", EVERY if full() else FEW)
def test_the_matrices_times_the_values_are_the_output(variant):
    """Of every variant, to the rounding of float64, on every path that is shown; a causal one takes from the past alone."""
    found = mixed(variant)
    assert found and any(one.whole for one in found)
    for one in found:
        matrices, root = one.matrices.values, one.path.root.data
        if "after" in one.title:  # there a projection of channels is in between
            continue
        course = Random(3).normal((root.shape[-2], 1), np.float64)
        with use(kernel="none"):
            made = one.path.of(np.broadcast_to(course, root.shape).copy())  # [B T C]
        weighed = matrices @ np.tile(course[:, 0], one.matrices.blocks)  # [N B·T]
        for channels, y in zip(one.matrices.channels, weighed, strict=True):
            assert np.allclose(made[..., channels], y.reshape(*made.shape[:2], 1), rtol=0, atol=1e-10)
        assert one.matrices.error < 1e-10
        if variants.load(variant).causal and matrices.shape[1:] == (8, 8):
            assert not np.triu(matrices, 1).any()


def one_of(found, title):
    return next(one for one in found if one.title == title)


def test_softmax_rows():
    found = mixed("transformer")
    call = one_of(found, "attention").call
    q, k = call.named("q").data[0], call.named("k").data[0]
    scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
    weights = np.exp(np.where(np.tri(8, dtype=bool), scores, -np.inf))
    assert np.allclose(one_of(found, "attention").matrices.values, weights / weights.sum(-1, keepdims=True), atol=1e-10, rtol=0)


def test_decays():
    """Retention without a divisor is q · k times the decay to the power of the distance."""
    found = mixed("retnet", normalization="none", heads=2)
    one = one_of(found, "retention")
    q, k, decay = (one.call.named(name).data for name in ("q", "k", "decay"))
    lags = np.subtract.outer(np.arange(8), np.arange(8))
    expected = np.tril(q[0] @ k[0].swapaxes(1, 2) * decay[:, None, None] ** np.maximum(lags, 0))
    assert np.allclose(one.matrices.values, expected, atol=1e-10, rtol=0)


def test_channels_that_fade_alone():
    """WKV has a matrix for each channel, whose rows add up to one; the gate is in that of the whole path."""
    found = mixed("rwkv")
    alone, whole = one_of(found, "wkv alone"), one_of(found, "wkv, gated")
    k, w, u = (alone.call.named(name).data for name in "kwu")
    lags = np.subtract.outer(np.arange(8), np.arange(8))[..., None]
    logs = np.where(lags > 0, (lags - 1) * w + k[0][None], np.where(lags == 0, u + k[0][None], -np.inf))  # [T S C]
    weights = np.exp(logs)
    expected = np.moveaxis(weights / weights.sum(1, keepdims=True), 2, 0)
    assert len(alone.matrices.values) == 8 and np.allclose(alone.matrices.values, expected, atol=1e-10, rtol=0)
    assert np.allclose(alone.matrices.values.sum(-1), 1)
    gate = np.diagonal(whole.matrices.values / alone.matrices.values.clip(1e-300), axis1=1, axis2=2)  # [C T]
    assert np.allclose(whole.matrices.values, gate[..., None] * alone.matrices.values) and ((gate > 0) & (gate < 1)).all()


def test_filters():
    """Hyena's convolution is a Toeplitz matrix of its filter; with both gates a product of diagonals around it."""
    found = mixed("hyena")
    alone, whole = one_of(found, "long_conv alone"), one_of(found, "long_conv, gated")
    taps, skip = alone.call.named("filter").data, alone.call.named("skip").data
    for c, matrix in enumerate(alone.matrices.values):
        assert np.allclose(matrix[:, 0], taps[:, c] + skip[c] * (np.arange(8) == 0), atol=1e-10, rtol=0)
        for lag in range(8):
            assert np.ptp(np.diagonal(matrix, -lag)) < 1e-10
    assert np.linalg.matrix_rank(whole.matrices.values[0] / alone.matrices.values[0].clip(1e-300)[:, :1][0]) >= 1


def test_buckets_dilations_and_patches():
    found = mixed("reformer", buckets=4, rounds=1)
    one = one_of(found, "lsh_attention")
    buckets = one.call.named("buckets")[0, :, 0]
    for matrix, bucket in zip(one.matrices.values, buckets, strict=True):
        apart = bucket[:, None] != bucket
        assert not matrix[apart & ~np.eye(8, dtype=bool)].any() and np.allclose(matrix.sum(-1), 1)
    found = mixed("longnet", segments="4:2", heads=2)
    for head, matrix in enumerate(one_of(found, "dilated_attention").matrices.values):
        t, s = np.indices((8, 8))
        assert not matrix[(t // 4 != s // 4) | (s % 2 != head)].any()
    found = mixed("megabyte", patch="4", layers=2)
    local = found[-1].matrices
    t, s = np.indices((8, 8))
    assert local.blocks == 2 and not local.values[:, t // 4 != s // 4].any()


def test_what_is_mixed_twice():
    """Linformer's mixtures, and the shaped attention of the simplified blocks, are one matrix each."""
    found = mixed("linformer", projected_length=4)
    both, first = one_of(found, "attention after project"), [one for one in found if one.title == "project"][1]
    assert np.allclose(both.matrices.values, one_of(found, "attention").matrices.values @ first.matrices.values[0])
    found = mixed("simplified", heads=2)
    whole, alone = found[0].matrices.values, one_of(found, "attention alone").matrices.values
    shaping = one_of(found, "shaping of v alone").call
    alpha, beta, gamma = (shaping.named(name).data[:, None, None] for name in ("alpha", "beta", "gamma"))
    centre = np.tri(8) / np.arange(1, 9)[:, None]
    assert np.allclose(whole, alpha * np.eye(8) + beta * alone - gamma * centre, atol=1e-10, rtol=0)


def test_an_estimate_stands_beside_what_it_estimates():
    found = mixed("performer", random_features=4096)
    exact, estimate = one_of(found, "attention, which favor estimates"), one_of(found, "favor")
    error = np.abs(exact.matrices.values - estimate.matrices.values).max()
    assert 0 < error < 0.2 and np.allclose(exact.matrices.values.sum(-1), 1)


class Mean(Module):
    """A model of one's own: an operator that no file of the library knows, and a product with weights that no law tells of."""

    def __init__(self, declared):
        self.weight, self.out = Parameter(np.eye(8)), Linear(Random(0), 4, 4, std=1.0, dtype=np.float64)
        self.declared = declared

    def __call__(self, x):
        return self.out(past_mean(x) if self.declared else matmul(softmax(self.weight), x))


@op("v[B T V] -> y[B T V]", laws=[linear_in("v")])
def past_mean(v):
    """The mean of the past."""
    return np.cumsum(v, axis=1) / np.arange(1, v.shape[1] + 1)[:, None]


past_mean.form(lambda v: matmul(np.tri(v.shape[1]) / np.arange(1, v.shape[1] + 1)[:, None], v))
REGISTRY.pop("past_mean")  # other tests enumerate the registry


@pytest.mark.parametrize("declared", [True, False])
def test_an_operator_of_ones_own_needs_nothing_else(declared):
    model = Mean(declared)
    (one,) = mixings(record(lambda: model(Tensor(Random(1).normal((1, 8, 4), np.float64)))), model)
    expected = np.tri(8) / np.arange(1, 9)[:, None] if declared else softmax(model.weight).numpy()
    assert np.allclose(one.matrices.values[0], expected) and one.matrices.name(0) == "all channels"


def test_no_variant_is_named():
    """What is shown follows from what operators declare: the sources of the page name no variant and no operator of one."""
    sources = Path(minitv.explore.__file__).parent
    texts = [path.read_text("utf-8") for path in sources.iterdir() if path.suffix in (".py", ".js")]
    named = {word for text in texts for word in re.findall(r"""["'`]([\w-]+)["'`]""", text)}
    assert len(texts) > 3 and not named & {*EVERY, *operators_of("minitv.ops")}


def test_what_is_no_mixing():
    """A call that is not linear, that mixes channels, or whose matrix would not tell its output."""
    x = Tensor(Random(0).normal((1, 8, 4), np.float64))
    call = lambda f: record(lambda: f(x))[-1]  # noqa: E731
    assert not is_linear(call(lambda x: x * x), {id(x)}, Random(0)) and is_linear(call(lambda x: x + 1.0), {id(x)}, Random(0))
    mixing_channels = call(lambda x: matmul(x, Random(1).normal((4, 4), np.float64)))
    assert Way(x, mixing_channels.outputs[0], [mixing_channels]).matrices() is None


def test_a_watcher_is_told_of_the_calls_of_a_program_alone():
    """Not of those that forms make, in order, and no more after the block."""
    seen = []
    x = np.ones((1, 1, 2, 2))
    with use(kernel="none"), watch(lambda op, args, kwargs, result: seen.append(op.name)):
        attention(x, x, x, causal=False)
        with pytest.raises(minitv.errors.UserError), watch(lambda *call: None):
            raise minitv.errors.UserError("left")
        Tensor(x) + 1.0
    Tensor(x) + 1.0
    assert seen == ["attention", "add"]
    assert isinstance(record(lambda: softmax(x))[0], Call)


# -- a run -------------------------------------------------------------------------------------------------------------
HOSTILE = "</script><script>alert(1)</script> & <b>bold</b>\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small runs on a text that would break a careless page, in folders with names that would, too."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "my.txt").write_text(HOSTILE * 40)
    (folder / "short.txt").write_text(HOSTILE[:17])
    common = dict(data=str(folder / "my.txt"), steps=2, eval_every=2, context=16, layers=1, width=16, sample_tokens=20)
    minitv.train("transformer", out=str(folder / "a<b>&amp;"), **common)
    minitv.train("rwkv", out=str(folder / "rwkv"), **common)
    return folder


@pytest.fixture(scope="module")
def studied(runs):
    return study(str(runs / "a<b>&amp;"), ExploreOptions(), 16, "a<b>&amp;")


def test_numbers_are_those_of_python(runs, studied):
    """The bits of tokens are those of ``minitv eval``, the matrices those of the model."""
    run = minitv.load(str(runs / "rwkv"))
    result = study(str(runs / "rwkv"), ExploreOptions(text=str(runs / "short.txt")), 16)
    bits = [item["bits"] for item in result["text"]["items"] if "bits" in item]
    ids = run.tokenizer.encode(HOSTILE[:17])
    assert np.allclose(bits, surprise(run.model, ids) / math.log(2), rtol=1e-5)
    assert "".join(item["word"] for item in result["text"]["items"]) == HOSTILE[:17]
    assert result["state"]["bytes"][0] == result["state"]["bytes"][-1] and result["state"]["tokens"][-1] == 16
    one = studied["mixings"][0]
    values = np.frombuffer(base64.b64decode(one["values"]), "<f4").reshape(-1, *one["shape"])
    assert values.shape == (4, 16, 16) and np.allclose(values.sum(-1), 1, atol=1e-6) and one["sums"] == [1.0, 1.0]
    influence = np.frombuffer(base64.b64decode(studied["influence"]["matrix"]), "<f4").reshape(16, 16)
    assert not np.triu(influence, 1).any() and np.diagonal(influence).all()
    assert {label for label, _ in studied["facts"]} >= {"variant", "size", "receptive field", "state", "example"}


def test_nothing_of_a_text_is_obeyed(studied):
    text = page([studied], "", 16)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1)
    assert json.loads(data)["runs"][0]["name"] == "a<b>&amp;" and "<" not in data
    assert "<b>" not in text and "alert(1)" not in text.replace(data, "") and text.count("<script") == 3
    assert "default-src 'none'" in text and not re.search(r'(?:src|href)="(?!data:,)', text)


def test_the_command(runs, capsys, monkeypatch):
    pytest.importorskip("plotly")
    out = runs / "both.html"
    assert main(["explore", str(runs / "a<b>&amp;"), str(runs / "rwkv"), "--tokens", "8", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert 10**6 < out.stat().st_size < LIMIT and not list(runs.glob(".*.partial"))


def test_wrong_input_is_one_sentence(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minitv.explore.library", lambda: "")
    (tmp_path / "new.txt").write_text("Ωmega and more\n" * 3)
    (tmp_path / "one.txt").write_text("<")
    (tmp_path / "bytes").write_bytes(b"\xff\xfa\x00")
    (tmp_path / "compare.json").write_text("{}")
    run = str(runs / "rwkv")
    for arguments, words in [
        ([], "missing: DIR"), ([str(tmp_path / "none")], "none: there is no such folder, allowed: "),
        ([str(tmp_path / "one.txt")], "one.txt: this is no folder, allowed: "), ([""], "there is no such folder"),
        ([run, run], "named twice"),
        ([run, "--tokens", "1"], "--tokens"),
        ([run, "--text", str(tmp_path / "new.txt")], "U+03A9"),
        ([run, "--text", str(tmp_path / "new.txt")], "--text: "), ([run, "--text", str(tmp_path / "no.txt")], "--text "),
        ([run, "--text", str(tmp_path / "bytes")], "give another encoding with --encoding"),
        ([run, "--text", str(tmp_path / "one.txt")], "at least two"),
        ([run, "--text", str(tmp_path / "no.txt")], "no.txt"), ([run, "--out", str(tmp_path)], ".html"),
        ([run, "--out", str(tmp_path / "no" / "x.html")], "no folder"), ([str(tmp_path)], "compare writes"),
    ]:
        assert main(["explore", *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("minitv: error: ") and words in error, error
        assert "--data" not in error and "--tokenizer" not in error, error  # this command has neither
    text = (runs / "my.txt").read_text()
    (runs / "my.txt").unlink()
    try:
        assert main(["explore", run]) == 2
        assert "--text FILE" in capsys.readouterr().err
        assert main(["explore", run, "--text", str(runs / "short.txt"), "--out", str(tmp_path / "x.html")]) == 0
    finally:
        (runs / "my.txt").write_text(text)


def test_without_plotly(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["explore", "nowhere"]) == 2
    assert "plotly" in capsys.readouterr().err


# -- in a browser ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("plotly")
    if reason := missing():
        pytest.skip(reason)
    browser = start(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


def no_complaints(browser):
    """No error on the console, and no request but for the page itself."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("file://", "data:", "blob:")) for url in urls), urls


@pytest.mark.full
@pytest.mark.parametrize("width, scheme", [(360, "dark"), (1440, "light")])
def test_the_page_in_a_browser(runs, browser, width, scheme):
    """Every panel draws, fits the screen, and has the numbers of Python; two runs stand side by side."""
    path = runs / f"page-{width}.html"
    assert main(["explore", str(runs / "a<b>&amp;"), str(runs / "rwkv"), "--out", str(path)]) == 0
    show(browser, path, width, scheme)
    script = browser.execute_script
    assert script("return document.documentElement.scrollWidth") <= width
    panels = script("""return [...document.querySelectorAll('section[id]')].filter((s) => !s.hidden).map((s) => [s.id,
        [...s.querySelectorAll('.plot')].filter((p) => !p.hidden).map((p) => p.querySelectorAll('.main-svg').length)])""")
    names = {name for name, _ in panels}
    expected = ("text", "mixing", "distance", "influence", "state", "sample")
    assert {f"{panel}-{side}" for panel in expected for side in "ab"} <= names
    assert "curves" in names and all(drawn for _, plots in panels for drawn in plots)
    studies = [study(str(runs / name), ExploreOptions(), 64, name) for name in ("a<b>&amp;", "rwkv")]
    for side, expected in zip("ab", studies, strict=True):
        assert script(f"return document.getElementById('title-{side}').textContent").startswith(expected["name"])
        shown = script(f"return [...document.querySelectorAll('#tokens-{side} > span')].map((s) => s.textContent).join('')")
        assert shown.replace("⏎\n", "\n") == "".join(item["word"] for item in expected["text"]["items"])
        one = expected["mixings"][script(f"return +document.getElementById('call-{side}').value")]
        values = np.frombuffer(base64.b64decode(one["values"]), "<f4").reshape(-1, *one["shape"])[0]
        drawn = np.array(script(f"return document.querySelector('#mixing-{side} .plot').data[0].z.map((r) => Array.from(r))"))
        assert np.allclose(np.sign(drawn) * drawn**2, values, rtol=1e-5, atol=1e-9)
        row = script(f"return [...document.querySelectorAll('#mixing-{side} .rowtable td.number')].map((c) => +c.textContent)")
        assert np.allclose(row, np.sort(values[-1])[::-1][: len(row)], rtol=1e-3)
        held_out = expected["curve"]["held_out"][1]
        assert held_out in script("return document.querySelector('#curves .plot').data.map((d) => d.y)")
    item = studies[0]["text"]["items"][5]
    script("document.getElementById('tokens-a').querySelectorAll('span')[5].click()")
    said = script("return document.querySelector('#text-a .said').textContent")
    assert f"{item['bits']:.2f} bits" in said
    # the keyboard reaches a token, and every control has a name
    from selenium.webdriver.common.keys import Keys

    browser.find_element("id", "tokens-a").send_keys(Keys.ARROW_RIGHT)
    assert script("return document.querySelector('#tokens-a .on').id") == "token-a-6"
    assert script("""return [...document.querySelectorAll('select, input, button, [role=img], [role=listbox]')].every((e) =>
        e.labels && e.labels.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby'))""")
    # the other scheme changes the colours of what is drawn
    colour = "return document.querySelector('#curves .plot').layout.font.color"
    before = script(colour)
    prefer(browser, "light" if scheme == "dark" else "dark")
    time.sleep(0.3)
    assert script(colour) != before
    script("const s = document.getElementById('run-b'); s.value = '0'; s.dispatchEvent(new Event('change'))")
    assert script("return document.getElementById('title-b').textContent").startswith("a<b>&amp;")
    no_complaints(browser)
    assert library() and Path(path).stat().st_size < LIMIT


@pytest.mark.full
@pytest.mark.parametrize("width", [360, 1440])
def test_a_page_without_a_text_hides_its_panel(browser, tmp_path, width):
    """A model of speech reads no tokens: no empty panel stands there, and axes of heads are counted from 1."""
    run = tmp_path / "run"
    minitv.train("conformer", out=str(run), steps=1, eval_every=0, width=16, layers=1, batch=2)
    path = tmp_path / "page.html"
    assert main(["explore", str(run), "--out", str(path)]) == 0
    show(browser, path, width, "light")
    script = browser.execute_script
    assert script("return document.getElementById('text-a').offsetHeight") == 0
    assert script("return document.getElementById('mixing-a').offsetHeight") > 0
    panel = "[...document.querySelectorAll('#inputs-a h4')].map((h) => [h.textContent, h.nextElementSibling.data[0].y0])"
    assert script(f"return {panel}")[0] == ["u[H K]", 1]
    no_complaints(browser)


@pytest.mark.full
def test_a_page_begins_with_a_token_and_keeps_the_row_when_colours_change(runs, browser):
    path = runs / "one.html"
    assert main(["explore", str(runs / "rwkv"), "--out", str(path)]) == 0
    show(browser, path, 1440, "light")
    script = browser.execute_script
    items = study(str(runs / "rwkv"), ExploreOptions(), 64)["text"]["items"]
    last = max(i for i, item in enumerate(items) if item["row"] == 0)
    assert script("return document.querySelector('#tokens-a .on').id") == f"token-a-{last}"
    assert f"{items[last]['bits']:.2f} bits" in script("return document.querySelector('#text-a .said').textContent")
    script("const r = document.getElementById('row-a'); r.value = '3'; r.dispatchEvent(new Event('input'))")
    assert "bright" not in script("return document.querySelector('.pick .hint').textContent")
    prefer(browser, "dark")
    time.sleep(0.3)
    assert "bright" in script("return document.querySelector('.pick .hint').textContent")
    assert script("return document.getElementById('row-a').value") == "3"
    assert script("return document.querySelector('#tokens-a .on').id") == f"token-a-{last}"
    no_complaints(browser)
