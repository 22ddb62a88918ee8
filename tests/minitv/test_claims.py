"""Statements of the review: the registry, what measures, how a verdict follows from it, and the command."""

import functools
import json
import math
import re
import time

import numpy as np
import pytest

from minitv import cli, results, review
from minitv.claims import CONDITIONS, REAL, RIGHT, UNDECIDED, UNTESTABLE, VERDICTS, WRONG, chosen, claim, claims
from minitv.claims.measure import Measure, fitted, slope
from minitv.errors import UserError
from minitv.timing import alternating, crossover, fastest, inference, training

CLAIMS = claims()
SIZES = (64, 128, 256, 512, 1024, 2048)


# -- the registry ------------------------------------------------------------------------------------------------------
def test_every_number_is_declared():
    assert list(CLAIMS) == list(range(1, 60)) and all(each.number == number for number, each in CLAIMS.items())


@pytest.mark.parametrize("number", CLAIMS)
def test_a_claim_says_what_is_said_and_what_is_measured(number):
    each = CLAIMS[number]
    for sentence in (each.statement, each.experiment):
        assert re.fullmatch(r"[A-Z].* .*\.", sentence), sentence
    assert re.fullmatch(r"\S+ .*\.", each.paper), each.paper
    assert each.place and each.system
    assert each.command == f"minitv claims {number} --full"


def test_claims_are_chosen_by_number_and_system():
    assert chosen(()) == list(CLAIMS.values())
    assert [each.number for each in chosen(("3", "rwkv", "3"))] == [3, *(n for n, c in CLAIMS.items() if c.system == "RWKV")]
    with pytest.raises(UserError, match=r"there is no claim 600, allowed: 1, 2, 3"):
        chosen(("600",))
    with pytest.raises(UserError, match=r"unknown claim or system 'hyna', allowed: .*; did you mean hyena?"):
        chosen(("Hyna",))


def test_a_number_is_declared_once():
    with pytest.raises(UserError, match=r"claim 1 is declared twice: in minitv.claims.transformer and in "):
        @claim(1, "Transformer", "It is another statement.", place="here", paper="none")
        def other(measure):
            """Nothing is measured."""

    with pytest.raises(UserError, match=r"claim 1: nothing has no docstring"):
        @claim(1, "Transformer", "It is another statement.", place="here", paper="none")
        def nothing(measure):
            pass

    assert claims() == CLAIMS


def test_verdicts_are_a_few():
    assert {RIGHT, CONDITIONS, WRONG} == set(REAL) and {*REAL, UNTESTABLE, UNDECIDED} == set(VERDICTS)
    finding = RIGHT("It is so.", size=3)
    assert (finding.verdict, finding.measured, finding.numbers) == (RIGHT, "It is so.", {"size": 3})


# -- exponents ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5, 2.0, -1.0])
def test_exponents_of_powers_are_exact(exponent):
    with Measure() as measure:
        fit = measure.exponent("T", {size: 3.0 * size**exponent for size in SIZES})
    assert fit.exponent == pytest.approx(exponent, abs=1e-9) and fit.high - fit.low < 1e-6
    assert str(fit) == f"T^{exponent:.2f} ({exponent:.2f} to {exponent:.2f})"
    assert fit.to_json()["points"]["64"] == pytest.approx(3.0 * 64.0**exponent, rel=1e-4)


def test_the_interval_holds_the_exponent_in_95_of_100_cases():
    generator, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        fit = fitted("T", [(size, size**1.3 * math.exp(0.1 * generator.standard_normal())) for size in SIZES])
        inside += fit.low <= 1.3 <= fit.high
    assert 0.94 < inside / 2000 < 0.96


def test_an_exponent_needs_six_sizes():
    with pytest.raises(ValueError, match="at least 6 sizes, got 5"):
        Measure().exponent("T", {size: size for size in SIZES[:5]})
    assert slope([(1, 1), (2, 4)]) == (pytest.approx(2), math.inf)


@pytest.mark.parametrize("noise, growth", [(0.02, "T²"), (1.5, None)])
def test_the_nearest_growth_is_told_only_where_the_interval_says_so(noise, growth):
    generator = np.random.default_rng(1)
    fit = fitted("T", [(size, size**2 * math.exp(noise * generator.standard_normal())) for size in SIZES])
    assert fit.nearest({"T log T": lambda t: t * math.log(t), "T²": 2}) == growth
    assert fitted("T", [(t, t * math.log(t)) for t in SIZES]).nearest({"T": 1, "log": lambda t: t * math.log(t)}) == "log"


def test_halves_of_the_rounds_that_differ_widen_the_interval():
    class Planted(Measure):
        def times(self, calls, seconds=None):
            return {size: [size**1.0] * 3 + [size**1.4] * 3 for size in calls}

    fit = Planted().exponent("T", dict.fromkeys(SIZES, print))
    assert fit.exponent == pytest.approx(1.0) and (fit.low, fit.high) == (pytest.approx(1.0), pytest.approx(1.4))
    assert fit.nearest({"T": 1, "T²": 2}) == "T" and fit.nearest({"T": 1, "T^1.3": 1.3}) is None


# -- times and memory --------------------------------------------------------------------------------------------------
def test_calls_alternate_in_rounds():
    order = []
    times = alternating({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, 3, most=1)
    assert order == ["a", "a", "b", "b", "a", "b", "b", "a", "a", "b"]  # twice before the rounds
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}


def test_times_are_those_of_the_processor():
    with Measure() as measure:
        times = measure.times({"waits": lambda: time.sleep(0.002), "works": lambda: sum(range(100_000))}, 0.0)
    assert max(times["waits"]) < 0.001 < 0.002 <= fastest(lambda: time.sleep(0.002), 0.0)
    assert min(times["works"]) > 1e-4


def test_memory_is_what_numpy_allocates():
    with Measure() as measure:
        assert measure.memory(lambda: np.zeros(500_000)) == pytest.approx(4e6, rel=0.01)
        assert measure.memory(lambda: np.zeros(500_000).sum() + np.ones(250_000).sum()) == pytest.approx(4e6, rel=0.01)
        size = measure.exponent("n", {n: measure.memory(lambda n=n: np.zeros((n, n))) for n in SIZES})
    assert size.nearest({"n": 1, "n²": 2}) == "n²"


def test_states_are_counted():
    with Measure() as measure:
        model = measure.model("transformer", context=32, width=16, layers=3, heads=2)
        assert [measure.state_bytes(model, t) for t in (0, 1, 20)] == [0, 2 * 3 * 16 * 4, 20 * 2 * 3 * 16 * 4]


def test_a_training_call_gives_all_gradients():
    from autograd import Tensor

    weight, x = Tensor(np.array([2.0, 3.0]), requires_grad=True), np.array([5.0, 7.0])
    gradients = training(lambda x: x * weight, x, weights=(weight,))()
    assert [g.numpy().tolist() for g in gradients] == [[2, 3], [5, 7]]
    assert not inference(lambda x: x * weight, x)().requires_grad


@pytest.mark.parametrize("times, place", [([4, 5, 6, 7], 2), ([1, 1, 1, 1], None), ([9, 9, 9, 9], None)])
def test_crossovers_lie_between_sizes(times, place):
    found = crossover((1, 2, 4, 8), times, [2, 5, 8, 8])
    assert found == place


# -- verdicts with planted measurements --------------------------------------------------------------------------------
class Grown(Measure):
    """Times and memories that grow as it is told, by the name of the size."""

    def __init__(self, exponents, noise=0.0):
        super().__init__()
        self.exponents, self.noise = exponents, noise

    def exponent(self, name, values, seconds=None):
        exponent = self.exponents.pop(0)
        points = [(size, size**exponent * math.exp(self.noise * self.rng.standard_normal())) for size in values]
        return fitted(name, points)

    def model(self, variant, **options):
        return tiny(variant)

    def layer(self, variant, length, width, **options):
        return print

    def normal(self, *shape):
        return np.zeros([1] * len(shape), np.float32)

    def memory(self, call):
        return 1


@functools.cache
def tiny(variant):
    return Measure().model(variant, context=2048, width=8, layers=1, positions="none")


@pytest.mark.parametrize("number, exponents, noise, verdict", [
    (1, [2, 1, 1.5, 1.5], 0.01, WRONG), (1, [1.12, 1, 1.5, 1.5], 0.001, RIGHT), (1, [1, 1, 1, 1], 0.001, WRONG),
    (1, [1.5, 1, 1.5, 1.5], 2.0, UNDECIDED),
    (2, [2, 1], 0.01, CONDITIONS), (2, [2, 2], 0.01, RIGHT), (2, [1, 1], 0.01, WRONG), (2, [1.5, 1.5], 2.0, UNDECIDED),
    (4, [2, 1], 0.01, CONDITIONS), (4, [1, 1], 0.01, WRONG),
    (5, [1, 1, 1, 1.9], 0.01, CONDITIONS), (5, [1, 1, 1, 1], 0.01, RIGHT), (5, [2, 1, 1, 1], 0.01, WRONG),
    (6, [0, 1, 1], 0.01, CONDITIONS), (6, [1, 1, 1], 0.01, RIGHT), (6, [0, 2, 1], 0.01, WRONG),
    (14, [1.13, 1.9, 0.9], 0.01, RIGHT), (14, [1.9, 1.9, 0.9], 0.01, WRONG), (14, [1.13, 1.5, 0.9], 1.0, UNDECIDED),
    (15, [1, 1, 0.8], 0.01, CONDITIONS), (15, [1, 1, 0.1], 0.01, RIGHT), (15, [2, 1, 1], 0.01, WRONG),
])
def test_a_verdict_follows_from_what_was_measured(number, exponents, noise, verdict):
    measure = Grown(list(exponents), noise)
    measure.begin(number)
    assert CLAIMS[number].test(measure).verdict is verdict


# -- the command -------------------------------------------------------------------------------------------------------
def test_four_rows_are_measured_and_written(tmp_path, capsys):
    path = tmp_path / "claims.json"
    assert cli.main(["claims", "8", "9", "10", "--json", str(path)]) == 0
    assert cli.main(["claims", "19", "--fast", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "9  RWKV: wrong\n" in out and "10  RWKV: right with conditions\n" in out and not err
    assert re.search(r"measured +The activation makes 168 numbers of 168", out) and "3 claims in " in out and "shown by" in out
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result["claims"]) == ["8", "9", "10", "19"] and result["host"] == results.host() and result["full"] is False
    assert result["claims"]["19"]["verdict"] == "right with conditions"
    assert result["claims"]["19"]["numbers"]["recurrence"] < 1e-4
    with pytest.raises(UserError, match="has results with another value of full, which would be lost"):
        next(review.examine(chosen(("9",)), True, path))


def test_the_same_row_gives_the_same_numbers():
    records = [review.examined(CLAIMS[10], measure) for measure in (Measure(), Measure())]
    assert records[0]["numbers"] == records[1]["numbers"]


def test_a_row_that_fails_is_no_verdict(tmp_path, monkeypatch, capsys):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "mine.py").write_text(
        "from minitv.claims import claim\n\n\n@claim(901, 'Mine', 'It divides.', place='here', paper='it says nothing')\n"
        "def divides(measure):\n    '''It divides by zero.'''\n    return 1 / 0\n", encoding="utf-8")
    monkeypatch.setenv("MINITV_PATH", str(tmp_path))
    import minitv.claims

    monkeypatch.setattr(minitv.claims, "__path__", list(minitv.claims.__path__))
    monkeypatch.setattr(minitv.claims, "_claims", dict(minitv.claims._claims))
    path = tmp_path / "all.json"
    assert cli.main(["claims", "mine", "9", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"failed +ZeroDivisionError: division by zero \(mine.py, line 7\)", out)
    assert "1 wrong, 1 failed" in out
    assert list(json.loads(path.read_text(encoding="utf-8"))["claims"]) == ["9"]


@pytest.mark.parametrize("argv, sentence", [
    (["--fast", "--full"], "--fast and --full: give one of them"),
    (["77777"], "there is no claim 77777, allowed: 1, 2,"),
    (["transfomer"], "unknown claim or system 'transfomer', allowed: "),
    (["9", "--json", "nowhere/claims.json"], "--json nowhere/claims.json: there is no folder nowhere"),
    (["9", "--json", "other.json"], "--json: other.json: this file holds something else than such results"),
    (["9", "--json", ""], "--json: an empty text is no file"),
])
def test_mistakes(tmp_path, monkeypatch, capsys, argv, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text('{"claims": 3}')
    assert cli.main(["claims", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"minitv: error: {sentence}") and err.count("\n") == 1
    assert (tmp_path / "other.json").read_text() == '{"claims": 3}'


@pytest.mark.full
def test_a_training_is_done_once():
    options = dict(task="induction", context=8, symbols=5, width=8, layers=1, steps=3, batch=4, eval_every=3, eval_examples=20)
    with Measure() as measure:
        run = measure.train("rwkv", **options)
        assert measure.train("rwkv", **options) is run
        again = measure.train("rwkv", seed=0, **options)
        assert again is not run and again.value == run.value and again.loss == run.loss
        assert run.folder.is_dir() and 0 <= run.value <= 1 and run.parameters > 0
    assert not run.folder.exists()
