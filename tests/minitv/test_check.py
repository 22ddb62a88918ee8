"""`minitv check`: what it proves holds, what is planted is found, and the line that it prints shows the failure again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from autograd import REGISTRY, DeviceError, Tensor, concat, shrink, use, verify
from autograd.draw import LAYOUTS, Draw
from autograd.proof import smallest
from autograd.stability import stability
from minitv import check, cli, goldens, variants
from minitv.config import Options
from minitv.identities import between_variants, edges_of, homes, identities
from minitv.laws import LAWS, Specimen, laws_of
from minitv.nn import Parameter
from minitv.ops import attention, retention
from minitv.options import CheckOptions
from minitv.variants.transformer import Attention, Bidirectional

RIGHT = '''
"""An operator of a user: the mean of the past, in which position s has the weight e^k_s."""

import numpy as np

from autograd import exp, log, maximum, op, stack
from autograd.laws import causal, independent, linear_in


@op("k[B T C], v[B T C], mean[B C], logsum[B C] -> y[B T C], last[B C], total[B C]",
    laws=[causal("k v"), independent("B C"), linear_in("v")])
def my_mean(k, v, mean, logsum):
    """y_t = (e^logsum mean + sum over s up to t of e^k_s v_s) / (e^logsum + sum of e^k_s), its last one, and ln of the sum."""
    y, total = np.zeros_like(v), logsum.copy()
    for t in range(v.shape[1]):
        before, total = total, np.logaddexp(total, k[:, t])
        mean = np.exp(before - total) * mean + np.exp(k[:, t] - total) * v[:, t]
        y[:, t] = mean
    return y, mean.copy(), total


@my_mean.form
def recurrent(k, v, mean, logsum):
    means = []
    for t in range(v.shape[1]):
        top = maximum(logsum, k[:, t])
        old, new = exp(logsum - top), exp(k[:, t] - top)
        mean, logsum = (new * v[:, t] + old * mean) / (new + old), top + log(new + old)
        means.append(mean)
    return stack(means, axis=1), mean, logsum


def forward(k, v, mean, logsum):
    y, old, before = (np.empty(v.shape, v.dtype) for _ in range(3))
    for t in range(v.shape[1]):
        top = np.maximum(logsum, k[:, t])
        a, b = np.exp(logsum - top), np.exp(k[:, t] - top)
        before[:, t], old[:, t] = mean, a / (a + b)
        mean, logsum = (a * mean + b * v[:, t]) / (a + b), top + np.log(a + b)
        y[:, t] = mean
    return (y, mean.copy(), logsum), (v, old, before)


def backward(saved, g_y, g_last, g_total):
    v, old, before = saved
    gm, gl = (np.zeros_like(v[:, 0]) if g is None else g for g in (g_last, g_total))
    gk, gv = np.empty(v.shape, v.dtype), np.empty(v.shape, v.dtype)
    for t in range(v.shape[1] - 1, -1, -1):
        gm = gm if g_y is None else gm + g_y[:, t]
        new = 1 - old[:, t]
        turn = gm * new * old[:, t] * (v[:, t] - before[:, t])
        gv[:, t], gk[:, t] = gm * new, turn + gl * new
        gl, gm = gl * old[:, t] - turn, gm * old[:, t]
    return gk, gv, gm, gl


my_mean.kernel("cpu", module=__name__)


@my_mean.inputs
def _(draw):
    batch, length, channels = draw.size(0, 2, "B"), draw.size(1, 9, "T"), draw.size(0, 9, "C")
    return tuple(draw.floats(*shape) for shape in [(batch, length, channels)] * 2 + [(batch, channels)] * 2), {}
'''

# What is replaced in the kernel, by what, and words of the check that finds it.
FAULTS = {
    "a wrong value at one position": ("        y[:, t] = mean\n    return (y, mean",
                                      "        y[:, t] = mean + 0.01 * (t == 5)\n    return (y, mean", "values"),
    "a wrong gradient": ("turn = gm * new", "turn = 1.01 * gm * new", "gradients"),
    "a wrong gradient of the state": ("return gk, gv, gm, gl", "return gk, gv, gm, 0 * gl", "gradients"),
    "a leak from the future": ("        y[:, t] = mean\n    return (y, mean",
                               "        y[:, t] = mean + 1e-3 * v[:, -1]\n    return (y, mean", "values"),
    "another dtype": ("return (y, mean.copy()", "return (y.astype(np.float64), mean.copy()", "values"),
    "a written input": ("return (y, mean.copy()", "v *= 2\n    return (y, mean.copy()", "values"),
    "a forgotten tail": ("return (y, mean.copy()", "y[..., y.shape[-1] // 4 * 4:] = 0\n    return (y, mean.copy()", "values"),
    "strides that are not asked for": ("(np.empty(v.shape, v.dtype) for _ in range(3))",
                                       "(np.empty(v.shape, v.dtype) for _ in range(3))\n"
                                       "    v = v.ravel(order='K').reshape(v.shape)", "kernel cpu"),
    "other bits every time": ("return (y, mean.copy()",
                              "y += 1e-3 * next(globals().setdefault('CALLS', iter(range(10**9))))\n"
                              "    return (y, mean.copy()", "same bits twice"),
    "large keys that overflow": ("top = np.maximum(logsum, k[:, t])\n        a, b",
                                 "top = 0 * logsum\n        a, b", "T = "),
    "a wrong gradient of one position": ("return gk, gv, gm, gl", "return gk, gv * (2 if v.shape[1] == 1 else 1), gm, gl",
                                         "gradients"),
    "a written input that is the same when it is written again": ("    y, old, before = (np", "    k[:] = np.round(k, 1)\n"
                                                                  "    y, old, before = (np", "values"),
    "memory of an input": ("return (y, mean.copy()", "return (v if v.shape[1] == 1 and not (y - v).any() else y, v[:, -1]",
                           "values"),
}
FEW = ("a wrong value at one position", "a wrong gradient of the state", "large keys that overflow",
       "a written input that is the same when it is written again")


def options(**values) -> CheckOptions:
    declared = Options(CheckOptions)
    return declared.build(declared.merge(("test", values))[0])[0]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Curves over two lengths, and less patience with failures."""
    monkeypatch.setattr(check, "LENGTHS", (16, 64))
    monkeypatch.setattr(shrink, "TRIES", 150)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A module of a user's operator in the current folder, its text changed; its name."""
    names = []

    def write(old: str = "", new: str = "", name: str = "my_module") -> str:
        assert old in RIGHT
        (tmp_path / f"{name}.py").write_text(RIGHT.replace(old, new, 1) if old else RIGHT, "utf-8")
        names.append(name)
        return f"{name}:my_mean"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    REGISTRY.pop("my_mean", None)
    for name in names:
        sys.modules.pop(name, None)


def test_a_right_operator_of_a_user_holds(written, capsys):
    assert cli.main(["check", written(), "--draws", "2", "--scale", "100", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "kernel cpu      gradients" in out and "T=64" in out and "everything holds" in out
    assert all(len(line) <= 80 for line in out.splitlines()), max(out.splitlines(), key=len)


@pytest.mark.parametrize("fault", [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in FAULTS])
def test_a_wrong_kernel_of_a_user_is_found_and_made_small(fault, written, capsys):
    old, new, words = FAULTS[fault]
    assert cli.main(["check", written(old, new), "--forms", "cpu", "--draws", "10", "--scale", "100", "--processes", "1"]) == 1
    out = capsys.readouterr().out
    found = [line for line in out.splitlines() if line.startswith("FAILS: my_module:my_mean, kernel cpu")]
    assert any(words in line for line in found), out
    lines = [line.strip() for line in out.splitlines() if "import reproduce" in line]
    assert len(lines) == len(found)
    for line in lines:
        assert "from my_module import my_mean" in line
        with pytest.raises((AssertionError, ValueError)):  # when it is pasted; or a read-only array is written to
            exec(line, {})
    if fault == "large keys that overflow":
        assert "'kernel cpu', 1, 100.0, 0)" in lines[0]  # a sequence of one position
        return
    line = lines[0]
    arguments = []
    exec(line.replace("from autograd.shrink import reproduce; ", ""), {"reproduce": lambda *given: arguments.extend(given)})
    assert sum(x.size for x in arguments[3]) <= 24, line


def test_the_right_kernel_makes_the_printed_line_hold(written, capsys):
    """The line is about the fault: without it the same call holds."""
    name = written()
    check.operator(name)
    shrink.reproduce("my_mean", "kernel cpu", "values", [np.ones((1, 2, 1)), np.ones((1, 2, 1)), *np.ones((2, 1, 1))])
    assert "it holds" in capsys.readouterr().out
    with pytest.raises(LookupError, match="no check 'value', there are values, gradients"):
        shrink.reproduce("my_mean", "kernel cpu", "value", [])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (3, 0), (), (7, 20)], ids=str)
def test_an_array_is_written_as_python_that_makes_it(shape, layout):
    """With its dtype and its strides, which a fault may depend on."""
    x = Draw.seeded(0, np.float32, (layout,)).floats(*shape)
    y = eval(shrink._written(x), {"np": np})
    assert y.dtype == x.dtype and y.shape == x.shape and np.array_equal(x, y)
    assert not x.size or (y.flags.c_contiguous, y.strides[-1:] < (0,)) == (x.flags.c_contiguous, x.strides[-1:] < (0,))
    assert not x.size or y.flags.writeable == x.flags.writeable
    for special in (np.array([np.nan, np.inf, -np.inf]), np.full((2, 2), -np.inf), np.array([True, False]), np.arange(3)):
        z = eval(shrink._written(special), {"np": np})
        assert np.array_equal(z, special, equal_nan=special.dtype.kind == "f") and z.dtype == special.dtype


# -- models ------------------------------------------------------------------------------------------------------------
SLOW = ("its kernels give", "saved and loaded", "the kernels that write")  # which without --full one variant is asked for
EVERY = [pytest.param(name, law, id=f"{name}-{law}",
                      marks=[pytest.mark.full] if str(law).startswith(SLOW) and name != "retnet" else [])
         for name in variants.variants() for law in laws_of(variants.load(name))]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("name", "law"), EVERY)
def test_laws_of_models(name, law):
    law.check(Specimen(variants.load(name)), Draw.seeded(0))


def law_named(words: str):
    return next(law for law in LAWS if words in str(law))


class Ahead(Attention):
    """Sees one token ahead, in the call."""

    def __call__(self, x, rng=None):
        return super().__call__(x, rng) + 0.01 * _rolled(x)


def _rolled(x):
    return concat([x[:, 1:], x[:, :1]], axis=1)


class Forgetful(Attention):
    """Loses its first key when it reads in parts."""

    def prefill(self, x, state):
        y, state = super().prefill(x, state)
        return y, state._replace(keys=state.keys * np.where(np.arange(state.keys.shape[2]) == 0, 0.5, 1.0)[:, None])


class Mixed(Attention):
    """Mixes the sequences of a batch."""

    def __call__(self, x, rng=None):
        return super().__call__(x, rng) + 0.01 * x.mean(axis=0, keepdims=True)


class Cut(Attention):
    """Its gradient does not go through a factor."""

    def __call__(self, x, rng=None):
        y = super().__call__(x, rng)
        return y * Tensor.wrap(1 + 0.1 * np.tanh(y.data))


class Unsaved(Attention):
    """Has numbers that are not saved."""

    def __call__(self, x, rng=None):
        self.number = getattr(self, "number", np.random.default_rng().normal())
        return super().__call__(x, rng) + 0.01 * self.number


class Different(Attention):
    """Computes something else where kernels run."""

    def __call__(self, x, rng=None):
        return super().__call__(x, rng) * (1.1 if x.dtype == np.float32 else 1.0)


class Unused(Attention):
    """Has a weight that does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.idle = Parameter(np.ones(3, self.out.weight.dtype))


class Blind(Bidirectional):
    """Sees the past alone, and its record says that it sees everything."""

    causal = True


PLANTED = [(Ahead, "no later one", "transformer"), (Forgetful, "in parts", "transformer"),
           (Mixed, "do not meet", "transformer"), (Cut, "slope of the loss", "transformer"),
           (Unsaved, "saved and loaded", "transformer"),
           (Different, "its kernels give", "transformer"), (Unused, "every weight", "transformer"),
           (Blind, "it is not causal", "encoder")]


@pytest.mark.parametrize(("mixer", "words", "name"), PLANTED, ids=[mixer.__name__ for mixer, *_ in PLANTED])
def test_a_wrong_model_is_found(mixer, words, name):
    law, record = law_named(words), variants.load(name)
    assert law.about(record)
    with use(kernel="none"):
        law.check(Specimen(record), Draw.seeded(0))
        with pytest.raises(AssertionError):
            law.check(Specimen(replace(record, mixer=mixer)), Draw.seeded(0))


def test_a_state_that_is_written_is_found(monkeypatch):
    law, record, prefill = law_named("a state is a value"), variants.load("transformer"), Attention.prefill

    def writing(self, x, state):
        if state.keys.shape[2]:
            state.keys.data[...] *= 1.1
        return prefill(self, x, state)

    monkeypatch.setattr(Attention, "prefill", writing)
    with use(kernel="none"), pytest.raises(AssertionError):
        law.check(Specimen(record), Draw.seeded(0))


def test_a_wrong_model_fails_and_the_printed_line_shows_it(monkeypatch, capsys):
    call = Attention.__call__
    monkeypatch.setattr(Attention, "__call__", lambda self, x, rng=None: call(self, x, rng) + 0.01 * _rolled(x))
    record, law = variants.load("transformer"), law_named("no later one")
    row = check._model_row(record, law, {}, options())
    assert row.failure and "depend on it" in row.failure
    with pytest.raises(AssertionError, match="depend on it"):
        exec(row.example, {})
    assert "'T': " in row.example, row.example


# -- what is declared --------------------------------------------------------------------------------------------------
def test_identities_are_laws_with_two_ends():
    edges, declared = identities(), {law.edge for op in REGISTRY.values() for law in op.laws if law.edge}
    assert len(edges) == len(set(edges)) > 30
    names = {*REGISTRY, *variants.variants()}
    for edge in edges:
        assert edge.general in names and edge.general != edge.special and edge.when
        assert edge in declared or edge.general in variants.variants() or edge.special in variants.variants()
        assert edge.special in names or " " in edge.special or edge.special == "convolution", f"{edge.special}: a wrong name?"
    known = homes()
    assert known["attention"] == "transformer" and known["wkv"] == "rwkv" and known["lsh_attention"] == "reformer"
    lifted = {(edge.general, edge.special) for edge in between_variants()}
    assert {("rwkv", "aft-simple"), ("aft-full", "aft-simple"), ("reformer", "transformer"), ("longnet", "transformer"),
            ("grouped-query", "transformer"), ("megabyte", "transformer"), ("retnet", "linear attention")} <= lifted
    assert {edge.special for edge in edges_of(variants.load("rwkv"))} >= {"aft_simple"}


def test_every_variant_has_laws_of_its_kind():
    for name in variants.variants():
        record = variants.load(name)
        told = [str(law) for law in laws_of(record)]
        assert any("not causal" in law or "no later one" in law for law in told), name
        assert not record.causal or any("in parts" in law for law in told), name
        assert record.fused is None or any("kernels that write" in law for law in told), name


# -- options -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("argv", "sentence"), [
    ([], "give the names of variants or operators, as in minitv check retnet, or --all"),
    (["retnet", "--all"], "--all: it checks everything, so 'retnet' has no place beside it"),
    (["retnt"], "unknown variant or operator 'retnt'; did you mean retnet?"),
    (["qqqqqq"], "`minitv list` lists variants, `minitv explain` operators, and an operator of your own is MODULE:NAME"),
    (["no_such_module:op"], "no_such_module:op: no_such_module cannot be imported: ModuleNotFoundError: No module named"),
    (["autograd:no_op"], "autograd:no_op: autograd has no 'no_op', operators in it: "),
    (["autograd:Tensor"], "autograd:Tensor: this is type, allowed: an operator, which autograd.op declares"),
    (["retention", "--shape", "B=2 T"], "--shape: 'T' is no size, allowed: letters and sizes from 1, as in \"B=2 T=1000 H=4\""),
    (["retention", "--shape", "T=0"], "--shape: 'T=0' is no size"),
    (["retention", "--shape", "T=3,T=4"], "--shape: T is given twice"),
    (["retention", "--shape", "Q=3"], "--shape: nothing that is checked has a size Q, allowed: B H K T V"),
    (["attention", "--shape", "H=5 G=2"], "--shape: attention cannot have it: attention: k and v have G = 2 heads, which"),
    (["transformer", "--shape", "H=3"], "--shape: transformer cannot have it: --heads: 3 heads do not divide the width 16"),
    (["retention", "--forms", "parallell"], "--forms: nothing that is checked has a form or a kernel 'parallell', allowed: "
                                            "chunkwise, cpu, cpu step, cuda, parallel, recurrent"),
    (["retention", "--scale", "1,x"], "--scale: '1,x', allowed: numbers above 0 with commas between them, as in 1,10,100"),
    (["retention", "--forms", ","], "--forms: ',' names none, allowed: names with commas between them"),
    (["retention", "--shape", " "], "--shape: ' ' has no size, as \"B=2 T=1000 H=4\" has"),
    (["retention", "--shape", "T=\u0661"], "is no size, allowed"),
    ([":x"], "':x' is no name of an operator, allowed: MODULE:NAME"),
    (["my_module.py:x y"], "'my_module.py:x y' is no name of an operator"),
    (["..:x"], "'..:x' is no name of an operator"),
    (["exp", "--json", "no/folder/f.json"], "--json no/folder/f.json: there is no folder no/folder"),
    (["exp", "--json", "."], "--json .: this is a folder, allowed: a file"),
    (["retention", "--dtype", "float16"], "--dtype: 'float16' is unknown, allowed: float32, float64"),
    (["retention", "--device", "gpu"], "--device: 'gpu' is unknown, allowed: cpu, cuda"),
])
def test_wrong_options_are_a_sentence(argv, sentence, capsys):
    assert cli.main(["check", *argv]) == 2
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1


@pytest.mark.parametrize(("text", "words"), [
    ("import sys\nsys.exit(3)", "SystemExit: 3"), ("def f(:\n", "SyntaxError"), ("1 / 0", "ZeroDivisionError"),
    ("import autograd\n@autograd.op('x[N] -> y[N]')\ndef exp(x):\n    'y.'\n    return x\n", "'exp' is declared twice"),
])
def test_a_module_that_cannot_be_imported_is_a_sentence(text, words, written, tmp_path, capsys):
    name = written(name="broken_module")
    (tmp_path / "broken_module.py").write_text(text, "utf-8")
    assert cli.main(["check", name]) == 2
    message = capsys.readouterr().err
    assert "broken_module cannot be imported: " in message and words in message and message.count("\n") == 1


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    def missing():
        raise DeviceError("cuda: there is no GPU")

    monkeypatch.setattr(check, "gpu", missing)
    assert cli.main(["check", "exp", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "minitv: error: cuda: there is no GPU\n"


def test_inputs_that_cannot_be_drawn_are_a_failure_and_no_traceback(written, capsys):
    name = written("    batch, length", "    raise KeyError('no inputs')\n    batch, length")
    assert cli.main(["check", name, "--processes", "1"]) == 1
    out, err = capsys.readouterr()
    assert "declaration: KeyError: 'no inputs'" in out and "Traceback" not in out + err


def test_a_definition_alone_is_no_proof(written, tmp_path, capsys):
    name = written(name="alone")
    (tmp_path / "alone.py").write_text("from autograd import op\n\n\n@op('x[T] -> y[T]')\ndef my_mean(x):\n    'x.'\n"
                                       "    return x.copy()\n", "utf-8")
    assert cli.main(["check", name, "--processes", "1"]) == 1
    assert "FAILS: alone:my_mean, declaration: my_mean has no form, and there is nothing" in capsys.readouterr().out


def test_a_shape_of_ones_choice_and_a_file_for_machines(written, tmp_path, capsys):
    argv = ["check", written(), "--shape", "B=3 T=40 C=5", "--forms", "cpu", "--draws", "2", "--scale", "1"]
    assert cli.main([*argv, "--json", "found.json", "--seed", "3", "--dtype", "float64"]) == 0
    assert "values, this shape" in capsys.readouterr().out
    content = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert content["ok"] and content["options"]["seed"] == 3 and content["identities"]
    (result,) = content["results"]
    rows = {(row["route"], row["check"]): row for row in result["rows"]}
    assert rows["kernel cpu", "values, this shape"]["draws"] == 3
    assert rows["kernel cpu", "values"]["error"] < 1e-12  # in float64
    assert {route for route, _ in rows} == {"kernel cpu"}
    assert set(result["curves"][0]["points"]) == {"16", "64"}


def test_sizes_are_those_that_were_asked_for():
    for op in REGISTRY.values():
        known = set(check.letters(op))
        for letter in sorted(known - {"W", "R"}):  # of which not every number will do
            draw = Draw.seeded(1, sizes={letter: 6})
            with draw.filled():
                args, _ = op.draw(draw) if op.draw else (None, None)
            if args is None or op.variadic:
                continue
            axes = [x.shape[a.dims.index(letter) - len(a.dims)] for a, x in zip(op.signature.inputs, args, strict=True)
                    if x is not None and letter in a.dims]
            assert set(axes) <= {6}, (op.name, letter, axes)
    assert check.of_operator(attention, {"T": 7, "K": 3}) == {"T": 7, "S": 7, "K": 3, "V": 3}


def test_sizes_of_one_are_tried_whatever_is_drawn(written):
    """Ten random lengths need not have 1 among them."""
    check.operator(written(*FAULTS["a wrong gradient of one position"][:2]))
    report = verify("my_mean", 1, along=lambda route: route == "kernel cpu")
    assert any(" T=1: " in row.failure for row in report.rows), report
    assert {"T": 1} in smallest(REGISTRY["my_mean"]) and {"T": 0} not in smallest(REGISTRY["my_mean"])


def test_numbers_that_float32_does_not_have_are_no_error(written):
    """Where the definition is beyond the largest float32, infinity is the right answer."""
    more = """

@op("x[T] -> y[T]")
def tripled(x):
    "3^T x."
    return x * 3.0 ** len(x)


@tripled.form
def composed(x):
    for _ in range(x.shape[0]):
        x = x * 3.0
    return x
"""
    name = written("\n\n@my_mean.form", f"{more}\n\n@my_mean.form").replace("my_mean", "tripled")
    try:
        curves = stability(check.operator(name), (16, 256), (1,))
        assert [list(curve.points) for curve in curves] == [[16]] and curves[0].ok
    finally:
        REGISTRY.pop("tripled", None)


def test_an_error_that_grows_shows_in_the_curve(monkeypatch):
    form = retention.forms["recurrent"]
    call = form._call
    monkeypatch.setattr(form, "_call", lambda values: tuple(
        x * (1 + 1e-4 * max(0, values[0].shape[2] - 16) ** 2) if i == 0 else x for i, x in enumerate(call(values))))
    curves = {(c.route, c.scale): c for c in stability(retention, (16, 64), (1, 100), along=lambda r: r.startswith("form"))}
    assert curves["form parallel", 100].ok and not curves["form recurrent", 1].ok
    assert curves["form recurrent", 1].points[16].share < 1 < curves["form recurrent", 1].points[64].share


@pytest.mark.full
def test_work_is_shared_out_and_comes_back_in_order(capsys):
    chosen = check.units(["exp", "gelu", "relu"], options(draws=2))
    results = check.run(chosen, options(draws=2, processes=2))
    assert [result.unit.name for result in results] == ["exp", "gelu", "relu"] and all(result.ok for result in results)
    rows = check.summary(results)
    assert next(row for row in rows if row["what"] == "operators: laws")["names"] == 3
    assert capsys.readouterr().err == ""  # no terminal, no progress


def test_an_operator_of_several_variants_is_checked_once():
    names = [unit.name for unit in check.units(["transformer", "multi-query", "roformer", "attention"], options())]
    assert names.count("attention") == 1 and names[:2] == ["transformer", "attention"] and "rope" in names


def test_without_the_files_of_other_libraries_the_table_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(goldens, "FOLDER", tmp_path)
    goldens.calls.cache_clear()
    try:
        assert cli.main(["check", "rms_norm", "--forms", "composed", "--draws", "1"]) == 0
        assert "other libraries are not beside this package" in capsys.readouterr().out
    finally:
        goldens.calls.cache_clear()
