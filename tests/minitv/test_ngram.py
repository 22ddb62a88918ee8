"""N-gram baselines: equal to the definition on small texts, and to known figures on a large one."""

import math
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minitv.corpus import open_corpus
from minitv.ngram import after, ngram_bpc

SHAKESPEARE = Path(os.environ.get("MINITV_TINYSHAKESPEARE") or "tinyshakespeare.txt")


def witten_bell(train, vocab, order):
    """The definition, with dictionaries: a function p(history, token)."""
    following = defaultdict(Counter)
    for length in range(order + 1):
        for i in range(length, len(train)):
            following[tuple(train[i - length:i])][train[i]] += 1

    def p(history, token):
        lower = p(history[1:], token) if history else 1 / vocab
        seen = following.get(history)
        return lower if seen is None else (seen[token] + len(seen) * lower) / (seen.total_count + len(seen))

    for counter in following.values():
        counter.total_count = sum(counter.values())
    return p


@st.composite
def texts(draw):
    vocab = draw(st.integers(1, 5))
    ids = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=40)
    return draw(ids), draw(ids), vocab


@given(texts(), st.integers(0, 6))
def test_it_is_the_definition(text, max_order):
    train, held, vocab = text
    got = ngram_bpc(np.array(train), np.array(held), vocab, max_order)
    assert len(got) == max_order + 1
    both = train + held
    for order, bits in enumerate(got):
        p = witten_bell(train, vocab, order)
        scores = [p(tuple(both[max(0, i - order):i]), both[i]) for i in range(len(train), len(both))]
        assert bits == pytest.approx(-sum(map(math.log2, scores)) / len(held), abs=1e-12)


@given(texts(), st.integers(0, 5))
def test_probabilities_sum_to_one(text, order):
    train, before, vocab = text
    # One token more or less at the end of the held-out part: the difference is that token's bits.
    def total(held):
        return ngram_bpc(np.array(train), np.array(held), vocab, order)[order] * len(held)

    base = total(before)
    assert sum(2 ** (base - total([*before, token])) for token in range(vocab)) == pytest.approx(1)


def test_small_numbers_by_hand():
    # Training 0 1 0, held out 1, two tokens.
    # Order 0: (1 + 2 / 2) / (3 + 2) = 2/5. Order 1, after 0: (1 + 1 * 2/5) / (1 + 1) = 7/10.
    got = ngram_bpc(np.array([0, 1, 0]), np.array([1]), 2, 1)
    assert got == pytest.approx([-math.log2(2 / 5), -math.log2(7 / 10)])


def test_inputs_are_left_alone_and_narrow_ids_do_not_overflow():
    rng = np.random.default_rng(0)
    train, held = rng.integers(0, 200, 3000, np.uint8), rng.integers(0, 200, 300, np.uint8)
    copies = train.copy(), held.copy()
    assert ngram_bpc(train, held, 256) == ngram_bpc(train.astype(np.intp), held.astype(np.intp), 256)
    assert (train == copies[0]).all() and (held == copies[1]).all()


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="no tinyshakespeare.txt: give it by MINITV_TINYSHAKESPEARE")
def test_tinyshakespeare():
    corpus = open_corpus(str(SHAKESPEARE), context=64)
    assert corpus.tokenizer.vocab == 65
    got = ngram_bpc(corpus.training, corpus.held_out, 65)
    assert got == corpus.baselines
    assert got == pytest.approx([4.829, 3.586, 2.956, 2.559, 2.408, 2.450], abs=0.0006)


@given(texts())
def test_counts_in_a_context_are_n_grams_where_the_context_is_the_token_before(sample):
    train, held, vocab = sample
    assume(len(train) > 1)
    ids, length = np.array([*train, *held]), len(train)
    alone = after(np.zeros(length, int), ids[:length], np.zeros(len(held), int), ids[length:], vocab, 1 / vocab)
    p = after(ids[: length - 1], ids[1:length], ids[length - 1 : -1], ids[length:], vocab, alone)
    expected = ngram_bpc(ids[:length], ids[length:], vocab, max_order=1)
    np.testing.assert_allclose([-np.log2(alone).mean(), -np.log2(p).mean()], expected, rtol=0, atol=1e-12)
