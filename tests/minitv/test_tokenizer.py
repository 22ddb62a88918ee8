"""Tokenizers: text comes back, streams are complete, and what is unknown is named."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitv.errors import CheckpointError, UserError
from minitv.tokenizer import TOKENIZERS, ByteTokenizer, CharTokenizer, from_json

ANY = st.text(st.characters(exclude_categories=()), min_size=1)  # lone surrogates too
VALID = st.text(min_size=1)


@given(ANY)
def test_characters_come_back(text):
    tokenizer = CharTokenizer.train(text)
    ids = tokenizer.encode(text)
    alphabet = sorted(set(text))
    assert tokenizer.vocab == len(alphabet)
    assert ids.dtype == np.intp and ids.tolist() == [alphabet.index(c) for c in text]
    assert tokenizer.decode(list(ids)) == text
    decoder = tokenizer.decoder()
    assert [decoder.feed(i) for i in ids] == list(text)


@given(VALID)
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer.train("another text")
    ids = tokenizer.encode(text)
    assert tokenizer.vocab == 256 and ids.dtype == np.intp and bytes(ids.tolist()) == text.encode()
    assert tokenizer.decode(ids) == text
    decoder, pieces = tokenizer.decoder(), []
    for i, character in zip(np.cumsum([len(c.encode()) for c in text]), text, strict=True):
        start = sum(len(piece.encode()) for piece in pieces)
        fed = [decoder.feed(int(token)) for token in ids[start:i]]
        assert fed[:-1] == [""] * (len(fed) - 1) and fed[-1] == character  # as soon as it is complete, not before
        pieces.append(character)


def test_malformed_bytes_are_replaced():
    decoder = ByteTokenizer().decoder()
    assert [decoder.feed(b) for b in b"a\xffb\xc3(\xe2\x82\xac"] == ["a", "\ufffd", "b", "", "\ufffd(", "", "", "€"]
    assert ByteTokenizer().decode(np.array([0xC3])) == "\ufffd"


@pytest.mark.parametrize("text", ["a\r\nb\rc\n", "\ufeffa\x00", "𝄞é\u2028"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_nothing_is_translated(kind, text):
    tokenizer = TOKENIZERS[kind].train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_text_is_no_ids(kind):
    tokenizer = TOKENIZERS[kind].train("abc")
    assert tokenizer.encode("").shape == (0,) and tokenizer.encode("").dtype == np.intp
    assert tokenizer.decode([]) == ""


@given(ANY, st.sampled_from(sorted(TOKENIZERS)))
def test_json_round_trip(text, kind):
    tokenizer = TOKENIZERS[kind].train(text)
    stored = json.loads(json.dumps(tokenizer.to_json()))
    assert stored["kind"] == kind
    again = from_json(stored)
    assert type(again) is type(tokenizer) and again.to_json() == tokenizer.to_json()
    assert again.vocab == tokenizer.vocab


@pytest.mark.parametrize("stored", [
    None, [], {}, {"kind": "word"}, {"kind": ["char"]}, {"kind": "char"}, {"kind": "char", "characters": 3},
    {"kind": "char", "characters": ""}, {"kind": "char", "characters": "ba"}, {"kind": "char", "characters": "aa"},
    {"kind": "char", "characters": "a", "more": 1}, {"kind": "byte", "characters": "a"},
])
def test_damaged_json_is_refused(stored):
    with pytest.raises(CheckpointError, match="the stored tokenizer is"):
        from_json(stored)


def test_start():
    assert CharTokenizer.train("b\na").start().tolist() == [0]
    assert CharTokenizer.train("\tb\na").start().tolist() == [1]
    assert CharTokenizer.train("ba").start().tolist() == [0]
    assert ByteTokenizer().start().tolist() == [10]
    assert CharTokenizer.train("ba").start().dtype == np.intp


@pytest.mark.parametrize(("text", "named"), [
    ("ab!", "'!' (U+0021) at offset 2"), ("é", "'é' (U+00E9) at offset 0"), ("a\n", r"'\n' (U+000A) at offset 1"),
    ("ab𝄞a!", "'𝄞' (U+1D11E) at offset 2"), ("\udc80", r"'\udc80' (U+DC80) at offset 0"),
])
def test_an_unknown_character_is_named(text, named):
    with pytest.raises(UserError) as error:
        CharTokenizer.train("abc").encode(text)
    assert str(error.value) == f"the character {named} is unknown: this model knows 3 characters: 'abc'"


def test_a_long_alphabet_is_shortened():
    with pytest.raises(UserError, match=r"this model knows 1000 characters: .* and 920 more$") as error:
        CharTokenizer.train("".join(map(chr, range(0x4E00, 0x4E00 + 1000)))).encode("a")
    assert len(str(error.value)) < 250


def test_a_lone_surrogate_has_no_bytes():
    with pytest.raises(UserError, match=r"'\\udc80' \(U\+DC80\) at offset 1 is a lone surrogate"):
        ByteTokenizer().encode("a\udc80")


@pytest.mark.parametrize("ids", [[-1], [3], [0, 300]])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(UserError, match=r"must lie in \[0, 3\)"):
        CharTokenizer.train("abc").decode(ids)


def test_an_empty_text_has_no_alphabet():
    with pytest.raises(UserError, match="at least one character"):
        CharTokenizer.train("")
