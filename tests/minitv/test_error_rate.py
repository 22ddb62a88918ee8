"""Error rates: the fewest edits, sums over a corpus, and the interval of the bootstrap."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitv.error_rate import Edits, ErrorRate, character_error_rate, edits, error_rate, word_error_rate
from minitv.errors import UserError

texts = st.text("abc", max_size=6)


def fewest(reference, hypothesis):
    """The edit distance by its definition: from the first symbols, every way."""
    @cache
    def least(i, j):
        if i == len(reference) or j == len(hypothesis):
            return len(reference) - i + len(hypothesis) - j
        same = least(i + 1, j + 1) + (reference[i] != hypothesis[j])
        return min(same, least(i + 1, j) + 1, least(i, j + 1) + 1)

    return least(0, 0)


@given(texts, texts)
def test_edits_are_the_fewest_and_explain_the_lengths(reference, hypothesis):
    found = edits(reference, hypothesis)
    assert found.total == fewest(reference, hypothesis) and min(found) >= 0
    assert len(reference) - found.deletions + found.insertions == len(hypothesis)
    back = edits(hypothesis, reference)
    assert (back.substitutions, back.deletions, back.insertions) == (found.substitutions, found.insertions, found.deletions)


def test_each_kind_of_edit():
    assert edits("abc", "abc") == edits("", "") == Edits(0, 0, 0)
    assert edits("abc", "axc") == Edits(1, 0, 0) and edits("abc", "ac") == Edits(0, 1, 0)
    assert edits("abc", "abcd") == Edits(0, 0, 1) and edits("abc", "") == Edits(0, 3, 0) and edits("", "ab") == Edits(0, 0, 2)
    assert edits(["one", "two"], ["one", "three"]) == Edits(1, 0, 0)  # of whole words


def test_a_corpus_is_the_sum_of_its_edits_and_not_the_mean_of_its_rates():
    found = word_error_rate(["a b c d e f g h", "i"], ["a b c d e f g h", "j"])
    assert found[:1] == (1 / 9,) and found[3:] == (1, 0, 0, 9)
    assert word_error_rate(["a"], ["b c d"]).rate == 3  # there is no limit to insertions
    assert character_error_rate(["ab  cd\n"], ["ab cd"]).rate == 0 and character_error_rate(["ab cd"], ["abcd"]).rate == 0.2
    assert str(ErrorRate(0.12345, 0.1, 0.15, 1, 2, 3, 40)) == "12.3 % (95 %: 10.0 to 15.0)"


def test_the_interval_is_that_of_drawing_utterances_with_replacement():
    """Of equal utterances it is a binomial's: mean ± 1.96 standard deviations for many of them."""
    wrong = np.random.default_rng(0).random(400) < 0.3
    found = error_rate([["x"]] * 400, [["y"] if w else ["x"] for w in wrong])
    deviation = np.sqrt(found.rate * (1 - found.rate) / 400)
    assert found.rate == wrong.mean()
    assert abs(found.low - (found.rate - 1.96 * deviation)) < 0.01 and abs(found.high - (found.rate + 1.96 * deviation)) < 0.01
    again, other = (error_rate([["x"]] * 400, [["y"] if w else ["x"] for w in wrong], seed=seed) for seed in (0, 1))
    assert again == found and other[:1] == found[:1] and other != found


def test_a_draw_without_a_word_is_no_rate():
    """Some draws hold the empty reference alone, whose rate would be 0 / 0."""
    found = word_error_rate(["", "one"], ["", "two"])
    assert found[:3] == (1, 1, 1)


@pytest.mark.parametrize("perfect", [True, False])
def test_without_or_with_nothing_but_errors_the_interval_is_a_point(perfect):
    found = word_error_rate(["a b", "c"], ["a b", "c"] if perfect else ["", ""])
    assert found[:3] == ((0, 0, 0) if perfect else (1, 1, 1))


def test_wrong_arguments():
    with pytest.raises(UserError, match="there are 2 references and 1 hypotheses: an error rate needs one hypothesis for each"):
        word_error_rate(["a", "b"], ["a"])
    for empty in ([], [" ", ""]):
        with pytest.raises(UserError, match=f"the {len(empty)} references are empty, and an error rate is relative"):
            word_error_rate(empty, empty)
