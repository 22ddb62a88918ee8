"""Drawing tokens, and writing text from a saved run."""

import io
import itertools
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd import no_grad, state
from autograd.random import Random
from minitv import checkpoint, sample, variants
from minitv.cli import main
from minitv.errors import CheckpointError, RunError, UserError
from minitv.options import SampleOptions
from minitv.sample import choose, generate, penalise, streams
from minitv.tokenizer import ByteTokenizer, CharTokenizer
from tests.minitv import models

SMALL = dict(context=8, layers=1, width=16)
MODEL = variants.load("transformer").configure(**SMALL).to_json()["model"]
CHARACTERS = CharTokenizer("".join(sorted("\nabcdefgh éλ")))


def build(variant, vocab, dtype=np.float64, **options):
    """A model whose weights are large enough that the next token depends on all before."""
    made = models.build(variant, vocab, dtype, **{**SMALL, **options})
    rng = np.random.default_rng(0)
    for parameter in made.parameters():
        parameter.assign_((parameter.numpy() + rng.normal(size=parameter.shape)).astype(dtype))
    return made


def stored(config=None, drop=None, **state):
    """The state of a sound run with some of it replaced or dropped; save signs it."""
    sound = variants.load("transformer").configure(**SMALL).to_json()
    result = {"config": {**sound, **(config or {})}, "tokenizer": CHARACTERS.to_json(), "corpus_sha256": "", "step": 7,
              "best_loss": None, "elapsed_s": 1.0, "threads": 1, **state}
    return {key: value for key, value in result.items() if key != drop}


def write(directory, tokenizer, name="last", seed=0, **state):
    model = build("transformer", tokenizer.vocab, np.float32)
    for parameter in model.parameters():
        parameter.assign_(parameter.numpy() * np.float32(1 + seed))
    checkpoint.save(directory, name, model=model.state(), optimizer={}, state=stored(tokenizer=tokenizer.to_json(), **state))
    return str(directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sample") / "run", CHARACTERS)


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sample") / "bytes", ByteTokenizer())


# -- choose

POINTS = (np.arange(2000) + 0.5) / 2000


def drawn(logits, **options):
    """The distribution of choose: its share of an even grid of uniform numbers."""
    counts = np.bincount(choose(np.tile(logits, (len(POINTS), 1)), POINTS, **options), minlength=len(logits))
    return counts / counts.sum()


def chosen(logits, uniform, *options, **more):
    """The one choice of one row."""
    return choose(np.array(logits)[None], np.array([uniform]), *options, **more)[0]


def brute_force(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """The same distribution, by trying every set of tokens."""
    logits = logits.astype(np.float64)
    kept = list(range(len(logits)))
    if top_k is not None:
        kept = sorted(kept, key=lambda i: -logits[i])[:top_k]
    p = np.exp(logits[kept] / temperature)
    p /= p.sum()
    sets = (s for n in range(1, len(kept) + 1) for s in itertools.combinations(range(len(kept)), n))
    enough = [s for s in sets if p[list(s)].sum() >= top_p - 1e-12]
    smallest = min(enough, key=lambda s: (len(s), -p[list(s)].sum()))
    smallest = tuple(i for i in smallest if p[i] >= min_p * p.max())
    result = np.zeros(len(logits))
    for i in smallest:
        result[kept[i]] = p[i] / p[list(smallest)].sum()
    return result


@pytest.mark.parametrize("options", [
    {}, dict(temperature=0.3), dict(temperature=4.0), dict(top_k=1), dict(top_k=3), dict(top_k=100), dict(top_p=0.5),
    dict(top_p=0.9), dict(top_p=1e-9), dict(top_p=0.7, top_k=4, temperature=1.7),
    dict(min_p=0.2), dict(min_p=0.05, temperature=3.0), dict(min_p=1.0), dict(min_p=0.3, top_k=5, top_p=0.95),
])
def test_choose_draws_the_distribution(options):
    logits = np.random.default_rng(3).normal(size=7).astype(np.float32) * 1.5
    np.testing.assert_allclose(drawn(logits, **options), brute_force(logits, **options), atol=2e-3)


@given(logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), uniform=st.floats(0, 1, exclude_max=True),
       temperature=st.floats(0, 1e3), top_k=st.none() | st.integers(1, 20), top_p=st.floats(1e-9, 1), min_p=st.floats(0, 1))
def test_choose_never_leaves_what_is_allowed(logits, uniform, temperature, top_k, top_p, min_p):
    logits = np.array(logits, np.float32)
    token = chosen(logits, uniform, temperature, top_k, top_p, min_p)
    assert (logits > logits[token]).sum() < (top_k or len(logits))
    if temperature == 0 or top_k == 1:
        assert token == np.argmax(logits)
    if temperature > 0:
        # less likely than 2**-53 times the likeliest is never drawn
        below = (logits.max() - np.float64(logits[token])) / temperature
        assert below < 40 and np.exp(-below) >= min_p * (1 - 1e-12)


@given(st.lists(st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -np.inf]), min_size=1, max_size=50))
def test_the_order_of_logits_is_that_of_a_stable_sort(logits):
    rows = np.array([logits, logits[::-1]], np.float32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for many in (0, 1000):
            monkeypatch.setattr(sample, "MANY", many)
            assert sample._falling(rows).tolist() == np.argsort(-rows, axis=1, kind="stable").tolist()


def test_choose_by_hand():
    logits = np.log(np.array([0.1, 0.6, 0.3]))  # sorted: 1, 2, 0
    assert [chosen(logits, u) for u in (0.0, 0.59, 0.61, 0.89, 0.91, 1 - 2**-53)] == [1, 1, 2, 2, 0, 0]
    assert chosen(logits, 0.999, top_p=0.6 - 1e-9) == 1
    assert chosen(logits, 0.999, top_p=0.6 + 1e-9) == 2
    assert chosen(np.zeros(4), 0.99, temperature=0) == 0  # the first of equals


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("logits, token", [([1.0, np.nan, 2.0], 1), ([np.inf, 0.0], 0), ([-np.inf, -np.inf], 0)])
def test_what_is_no_number_is_not_drawn_from(logits, token, temperature):
    with pytest.raises(RunError, match=f"gives token {token} the logit"):
        chosen(logits, 0.5, temperature)
    assert chosen(np.array([-np.inf, 0.0]), 0.0, temperature) == 1  # a token that cannot come


def test_repetition_penalty_is_that_of_the_paper():
    """Keskar et al., the last equation of section 4.1: p_i = exp(x_i / (T I(i in g))) / sum, I = penalty or 1."""
    logits, seen = np.array([2.0, 1.0, 3.0, 0.5]), np.array([True, False, True, False])
    weights = np.exp(logits / (0.7 * np.where(seen, 1.3, 1.0)))
    np.testing.assert_allclose(drawn(penalise(logits, seen, 1.3), temperature=0.7), weights / weights.sum(), atol=2e-3)
    np.testing.assert_array_equal(penalise(-logits, seen, 2.0), [-4.0, -1.0, -6.0, -0.5])  # less likely, never more
    np.testing.assert_array_equal(penalise(logits, seen, 1.0), logits)


# -- generate


def test_every_token_of_prompt_and_text_is_penalised_once():
    """The penalty that generate applies, against the logits of the whole sequence."""
    model = build("transformer", 11)
    ids = [1, 5, 5]
    written = list(generate(model, np.array(ids), 5, Random(0), temperature=0, repetition_penalty=1.8))
    assert written != list(generate(model, np.array(ids), 5, Random(0), temperature=0))
    for token in written:
        logits = model(np.array([ids])).numpy()[0, -1]
        once = [x if i not in ids else x / 1.8 if x > 0 else x * 1.8 for i, x in enumerate(logits)]
        assert token == np.argmax(once)
        ids.append(token)


def test_a_prompt_without_ids_and_a_model_without_numbers_are_sentences():
    model = build("transformer", 11)
    with pytest.raises(UserError, match="give at least one id"):
        next(generate(model, np.array([], int), 5, Random(0)))
    model.embed.weight.assign_(np.full(model.embed.weight.shape, np.nan))
    with pytest.raises(RunError, match="no token can be drawn"):
        next(generate(model, np.array([1]), 5, Random(0)))


@pytest.mark.full
@pytest.mark.parametrize("variant", models.NAMES)
@pytest.mark.parametrize("prompt", [1, 5, 8, 13])
def test_the_state_gives_what_the_whole_sequence_gives(variant, prompt):
    """Greedy, past the end of the context: the same tokens as a full forward over what the model sees."""
    model = build(variant, 11)
    ids = list(np.random.default_rng(1).integers(0, 11, prompt))
    written = list(generate(model, np.array(ids), 30, Random(0), temperature=0))
    assert len(written) == 30 and len(set(written)) > 1
    limited = model.bounded
    seen = ids[-8:] if limited else ids
    for token in written:
        if limited and len(seen) > 8:
            seen = seen[-4:]
        assert token == np.argmax(model(np.array([seen])).numpy()[0, -1])
        seen = [*seen, token]


def test_a_context_of_one_token():
    model = build("transformer", 11, context=1)
    written = list(generate(model, np.array([3, 4]), 6, Random(0), temperature=0))
    for before, token in zip([4, *written], written, strict=False):
        assert token == np.argmax(model(np.array([[before]])).numpy()[0, -1])


def test_only_the_first_tokens_are_written_where_that_is_asked_for():
    model = build("transformer", 11)
    written = list(generate(model, np.array([10]), 200, Random(0), temperature=5.0, among=3))
    assert set(written) == {0, 1, 2} and max(generate(model, np.array([10]), 200, Random(0), temperature=5.0)) > 2


def test_the_seed_decides():
    model = build("transformer", 11)
    texts = [list(generate(model, np.array([1]), 20, Random(seed), temperature=5.0)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert list(generate(model, np.array([1]), 5, Random(0), temperature=5.0)) == texts[0][:5]


@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.5), dict(top_k=4, top_p=0.9, min_p=0.05)], ids=str)
@pytest.mark.parametrize("variant", ["transformer", "rwkv", "longnet"])
def test_sequences_side_by_side_are_those_that_each_prompt_gives_alone(variant, options, monkeypatch):
    """Past the end of the context, in groups of two and one."""
    monkeypatch.setattr(sample, "GROUP", 2)
    model, prompts = build(variant, 11), np.array([[1, 2, 3], [4, 5, 6], [7, 7, 7]])
    rngs = list(map(Random, range(3)))
    together = sample.written(model, prompts, 25, rngs, temperature=3.0, **options)
    assert together.tolist() == [list(generate(model, prompt, 25, rng, temperature=3.0, **options))
                                 for prompt, rng in zip(prompts, rngs, strict=True)]
    alike = sample.written(model, prompts[:1], 25, rngs, temperature=3.0, **options)
    assert alike.tolist() == sample.written(model, prompts[[0, 0, 0]], 25, rngs, temperature=3.0, **options).tolist()
    assert len({tuple(row) for row in alike}) == 3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("prompt", [3, 20])
@pytest.mark.parametrize("variant", ["transformer", "rwkv", "megabyte"])
def test_any_number_of_threads_writes_the_same(variant, prompt, fused, monkeypatch):
    """Logits to the last bit, past the end of the context; four and four and two of ten, and without kernels."""
    model, seen = build(variant, 11, np.float32, context=24), {}
    prompts, rngs = np.random.default_rng(0).integers(0, 11, (10, prompt)), list(map(Random, range(10)))
    choose = sample.choose
    monkeypatch.setattr(sample, "GROUP", 4)
    monkeypatch.setattr(sample, "WORK", 1)

    def watched(logits, uniforms, *options):
        for row, uniform in zip(logits, uniforms, strict=True):
            logs[number].append((uniform, row.tobytes()))
        return choose(logits, uniforms, *options)

    monkeypatch.setattr(sample, "choose", watched)
    logs = {number: [] for number in (1, 2, 3)}
    if not fused:
        monkeypatch.setattr("minitv.decode.unread", lambda model: "for a test")
    for number in logs:
        rows = sample.together(model, prompts, 70, rngs, threads=number, temperature=3.0)
        seen[number] = [next(rows) for _ in range(70)]
        assert next(rows, None) is None
    assert sorted(logs[1]) == sorted(logs[2]) == sorted(logs[3])
    np.testing.assert_array_equal(seen[1], seen[2])
    np.testing.assert_array_equal(seen[1], seen[3])
    np.testing.assert_array_equal(np.transpose(seen[1]), sample.written(model, prompts, 70, rngs, threads=2, temperature=3.0))


def test_threads_write_under_the_switches_of_the_caller_and_give_it_their_errors(monkeypatch):
    model, rngs, choose, grads = build("transformer", 11), list(map(Random, range(8))), sample.choose, []

    def watched(logits, *others):
        grads.append((threading.current_thread() is threading.main_thread(), state.switches().recording))
        return choose(logits, *others)

    monkeypatch.setattr(sample, "choose", watched)
    monkeypatch.setattr(sample, "WORK", 1)
    with no_grad():
        list(sample.together(model, np.array([[1]]), 3, rngs, threads=2))
    assert grads == [(False, False)] * 6
    model.embed.weight.assign_(np.full(model.embed.weight.shape, np.nan))
    with pytest.raises(RunError, match="no token can be drawn"):
        next(sample.together(model, np.array([[1]]), 3, rngs, threads=2))


# -- streams


def text_of(run, **options):
    return "".join(next(streams(run, SampleOptions(**options)))[1])


def test_same_seed_same_text(run):
    texts = [text_of(run, tokens=60, seed=seed, temperature=3.0) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 60 and set(texts[0]) <= set(CHARACTERS.characters)


def test_several_texts_have_the_seeds_that_follow(run):
    options = SampleOptions(count=3, seed=4, tokens=20, temperature=3.0)
    texts = [(seed, "".join(pieces)) for seed, pieces in streams(run, options)]
    assert texts == [(seed, text_of(run, seed=seed, tokens=20, temperature=3.0)) for seed in (4, 5, 6)]
    assert len({text for _, text in texts}) == 3
    stop = texts[1][1][9]  # what one of them does not write after that others do
    texts = [(seed, "".join(pieces)) for seed, pieces in streams(run, replace(options, stop=stop))]
    assert texts == [(seed, text_of(run, seed=seed, tokens=20, temperature=3.0, stop=stop)) for seed in (4, 5, 6)]
    assert len({len(text) for _, text in texts}) > 1


def test_the_first_pieces_do_not_wait_for_the_last(run):
    pieces = next(streams(run, SampleOptions(tokens=10**9)))[1]
    assert len("".join(itertools.islice(pieces, 5))) == 5


def scripted(monkeypatch, tokenizer, ids):
    """Let the model write these ids."""
    monkeypatch.setattr(sample, "together", lambda *args, **options: iter(np.array(list(ids))[:, None]))


@pytest.mark.parametrize("text, stop, expected", [
    ("abcdef", "d", "abc"),
    ("abcdef", "cde", "ab"),
    ("abcdef", "abc", ""),
    ("ababac", "abac", "ab"),  # a partial match that overlaps the real one
    ("aaab", "aab", "a"),
    ("abcabd", "abd", "abc"),
    ("abca", "abd", "abca"),
    ("abab", "abc", "abab"),  # ends within a partial match: it is written
    ("abé", "éé", "abé"),
    ("aéλb", "éλ", "a"),
    ("abc", "abcdef", "abc"),
])
@pytest.mark.parametrize("kind", ["char", "byte"])
def test_stop_text(run, byte_run, monkeypatch, text, stop, expected, kind):
    tokenizer = CHARACTERS if kind == "char" else ByteTokenizer()
    scripted(monkeypatch, tokenizer, tokenizer.encode(text))
    assert text_of(run if kind == "char" else byte_run, stop=stop) == expected


@given(text=st.text("ab", max_size=12), stop=st.text("ab", min_size=1, max_size=4))
def test_stop_text_is_the_first_occurrence(run, text, stop):
    with pytest.MonkeyPatch.context() as monkeypatch:
        scripted(monkeypatch, CHARACTERS, CHARACTERS.encode(text))
        assert text_of(run, stop=stop) == text.partition(stop)[0]


def test_characters_of_several_bytes_arrive_whole(byte_run, monkeypatch):
    scripted(monkeypatch, ByteTokenizer(), "aé€😀b".encode())
    assert list(next(streams(byte_run, SampleOptions()))[1]) == ["a", "é", "€", "😀", "b"]


@pytest.mark.parametrize("data, expected", [
    ("é".encode()[:1], "\ufffd"), (b"a\xf0\x9f\x98", "a\ufffd"), (b"\xffb", "\ufffdb"), (b"\xe2\x82b", "\ufffdb"),
])
@pytest.mark.parametrize("stop", [None, "zz"])
def test_an_incomplete_character_at_the_end_is_shown(byte_run, monkeypatch, data, expected, stop):
    scripted(monkeypatch, ByteTokenizer(), data)
    assert text_of(byte_run, stop=stop) == expected == data.decode(errors="replace")


def test_any_prompt_for_a_byte_model(byte_run):
    assert text_of(byte_run, prompt="😀 never seen", tokens=3)


def test_an_unknown_character_in_the_prompt(run):
    with pytest.raises(UserError, match=r"^--prompt: the character 'z' \(U\+007A\) at offset 2 is unknown"):
        text_of(run, prompt="abz")


# -- the command


def test_the_command_writes_the_prompt_and_what_follows(run, capsys):
    assert main(["sample", run, "--prompt", "abc", "--tokens", "9", "--seed", "4"]) == 0
    out, err = capsys.readouterr()
    assert (out.rstrip("\n"), err) == (("abc" + text_of(run, prompt="abc", tokens=9, seed=4)).rstrip("\n"), "")
    assert out.endswith("\n")


def test_the_prompt_from_standard_input(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("aé\n".encode()), encoding="ascii"))
    assert main(["sample", run, "--prompt", "-", "--tokens", "9"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == ("aé\n" + text_of(run, prompt="aé\n", tokens=9)).rstrip("\n")


@pytest.mark.parametrize("argv, sentence", [
    (["--prompt", "abz"], "--prompt: the character 'z' (U+007A) at offset 2 is unknown: this model knows 12 characters"),
    (["--checkpoint", "best"], "{run} has no checkpoint 'best', it has 'last'"),
])
def test_mistakes(run, capsys, argv, sentence):
    assert main(["sample", run, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minitv: error: " + sentence.format(run=run)) and err.count("\n") == 1


def test_the_command_writes_several_texts_apart(run, capsys):
    assert main(["sample", run, "--prompt", "ab", "--tokens", "9", "--seed", "4", "--count", "2"]) == 0
    parts = [f"--- text {n} of 2, seed {seed} ---\n" + ("ab" + text_of(run, prompt="ab", tokens=9, seed=seed)).rstrip("\n")
             for n, seed in ((1, 4), (2, 5))]
    out = capsys.readouterr().out
    assert out.startswith(parts[0] + "\n") and out.rstrip("\n").endswith(parts[1])


def test_one_checkpoint_of_a_run(tmp_path, capsys):
    folder = write(tmp_path, CHARACTERS)
    write(tmp_path, CHARACTERS, name="best", seed=3)
    texts = {}
    for words in (["{}"], ["{}", "--checkpoint", "best"], ["{}/best"], ["{}/best", "--checkpoint", "best"], ["{}/last"]):
        assert main(["sample", *(word.format(folder) for word in words), "--tokens", "30", "--temperature", "3"]) == 0
        texts[" ".join(words)] = capsys.readouterr().out
    assert texts["{}"] == texts["{}/last"] != texts["{}/best"]
    assert texts["{}/best"] == texts["{} --checkpoint best"] == texts["{}/best --checkpoint best"]
    assert main(["sample", f"{folder}/best", "--checkpoint", "last"]) == 2
    assert "--checkpoint last: " in capsys.readouterr().err


def test_a_terminal_is_asked_for_the_prompt(run, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"ab"))
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["sample", run, "--prompt", "-", "--tokens", "9"]) == 0
    assert "type the prompt, and end it with Ctrl-" in capsys.readouterr().err


@pytest.mark.parametrize("state, sentence", [
    (stored(config={"variant": "mystery"}), "unknown variant 'mystery'"),
    (stored(config={"model": {**MODEL, "width": 32}}), "the model does not fit: wrong shape: "),
    (stored(config={"model": {**MODEL, "layers": 2}}), "the model does not fit: missing: blocks.1."),
    (stored(config={"model": {**MODEL, "colour": 2}}), "colour"),
    (stored(tokenizer={"kind": "words"}), "the stored tokenizer is not one that minitv writes"),
    (stored(drop="config"), "config"),
    (stored(drop="tokenizer"), "the checkpoint has no tokenizer"),
])
def test_a_checkpoint_of_another_program(tmp_path, capsys, state, sentence):
    arrays = build("transformer", CHARACTERS.vocab, np.float32).state()
    checkpoint.save(tmp_path, "last", model=arrays, optimizer={}, state=state)
    with pytest.raises(UserError) as error:
        sample.load(str(tmp_path))
    assert sentence in str(error.value)
    assert main(["sample", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_run(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        sample.load(str(tmp_path / "nowhere"))
