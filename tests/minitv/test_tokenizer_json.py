"""Tokens of other programs: text in and out by a tokenizer.json, and ids in and out where a model came without one."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitv import checkpoint, tokenizer, variants
from minitv.cli import main
from minitv.corpus import open_corpus
from minitv.errors import CheckpointError, UserError
from minitv.sample import load
from minitv.sources import Reader
from minitv.tokenizer import HuggingFaceTokenizer, IdTokenizer, from_json
from tests.minitv import models

WORDS = "the quick brown fox jumps over a lazy dog. it isn't red, is it?\nThe fox: naïve, 12 times!\n"
SMALL = dict(context=8, layers=1, width=16)


def _bytes():
    """As of GPT-2: pairs of bytes, no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([WORDS], trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return made


def _pieces():
    """As of Llama: a word begins with its space, what is unknown is written in bytes, and <s> stands before a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.train_from_iterator(WORDS.split(), trainers.BpeTrainer(
        vocab_size=400, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def _words():
    """As of BERT: parts of words in small letters, [CLS] before a text and [SEP] after it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator([WORDS], trainers.WordPieceTrainer(
        vocab_size=120, show_progress=False, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return made


@pytest.fixture(scope="module")
def definitions():
    pytest.importorskip("tokenizers")
    return {"bytes": _bytes().to_str(), "pieces": _pieces().to_str(), "words": _words().to_str()}


@pytest.fixture(scope="module")
def kinds(definitions):
    return {name: HuggingFaceTokenizer(text, 500) for name, text in definitions.items()}


@pytest.fixture
def bytewise(kinds):
    return kinds["bytes"]


def spoken(decoder, ids):
    return [*(decoder.feed(int(i)) for i in ids), decoder.finish()]


# -- text in and out


@given(text=st.text(), seed=st.integers(0, 9))
def test_bytes_come_back_and_no_character_is_written_in_halves(kinds, text, seed):
    made = kinds["bytes"]
    ids = made.encode(text)
    assert ids.dtype == np.intp and made.decode(ids) == text
    rng = np.random.default_rng(seed)
    for some in (ids, rng.integers(0, 257, 30), rng.integers(0, 300, 30)):  # bytes in any order are rarely a text
        pieces = spoken(made.decoder(), some)
        assert "".join(pieces) == made.decode(some)
    for character in "é€😀":
        ids = made.encode(character)
        assert spoken(made.decoder(made.encode("a")), ids) == [""] * (len(ids) - 1) + [character, ""]


@pytest.mark.parametrize("kind", ["pieces", "words"])
def test_words_are_written_with_their_spaces(kinds, kind):
    made, text = kinds[kind], "the quick fox, isn't red 😀€"
    begin, ids = made.start("the quick"), made.start(text)
    assert ids[:len(begin)].tolist() == begin.tolist()
    rest = spoken(made.decoder(begin), ids[len(begin):])
    assert "".join(rest) == made.decode(ids)[len(made.decode(begin)):] and rest[0].startswith(" ")
    if kind == "pieces":
        assert made.decode(ids) == f"<s> {text}" and all("\ufffd" not in piece for piece in rest)


def test_what_a_text_begins_with(kinds, definitions):
    assert kinds["words"].start().tolist() == [2] and kinds["pieces"].start().tolist() == [1]
    assert kinds["words"].start("the").tolist() == [2, *kinds["words"].encode("the")]
    made = kinds["bytes"]
    assert made.decode(made.start()) == "\n" and made.decode(made.start("the fox")) == "the fox"
    first = HuggingFaceTokenizer(definitions["bytes"], 300, first=0)
    assert first.decode(first.start()) == "<|endoftext|>" and first.start("fox").tolist() == made.start("fox").tolist()
    assert made.encode("a<|endoftext|>").tolist()[-1] == 0
    of_another = HuggingFaceTokenizer(definitions["bytes"], 310, first=305)  # an id that spells nothing begins no text
    assert of_another.start().tolist() == made.start().tolist()


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_a_text_is_read_whole_whatever_the_definition_cuts(definitions, kind):
    from tokenizers import Tokenizer

    cut = Tokenizer.from_str(definitions[kind])
    cut.enable_truncation(4)
    cut.enable_padding(length=100)
    made = HuggingFaceTokenizer(cut.to_str(), 500)
    assert made.encode(WORDS).tolist() == HuggingFaceTokenizer(definitions[kind], 500).encode(WORDS).tolist()


def test_a_document_is_read_in_pieces_that_end_with_words(bytewise, tmp_path, monkeypatch):
    text = WORDS * 40 + "é" * 300 + " ".join("ab" for _ in range(300))
    (tmp_path / "text").write_text(text, encoding="utf-8")
    document = Reader("--data", "utf-8", False, print).open(str(tmp_path / "text")).documents[0]
    whole, middle = bytewise.encode(text), len(WORDS) * 17 + 9
    for size in (64, 1000, 10**6):
        monkeypatch.setattr(tokenizer, "PIECE", size)
        parts = list(bytewise.read(document))
        ids = np.concatenate([ids for ids, _ in parts])
        assert bytewise.decode(ids) == text and sum(characters for _, characters in parts) == len(text)
        assert size < 300 or ids.tolist() == whole.tolist()  # words are shorter than that
        halves = [list(bytewise.read(document, *part)) for part in ((0, middle), (middle, None))]
        assert [bytewise.decode(np.concatenate([ids for ids, _ in half])) for half in halves] == [text[:middle], text[middle:]]


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_pieces_of_a_document_have_the_ids_of_the_whole(kinds, kind, tmp_path, monkeypatch):
    """Also where the tokenizer puts a space before a text."""
    text = WORDS * 40
    (tmp_path / "text").write_text(text, encoding="utf-8")
    monkeypatch.setattr(tokenizer, "PIECE", 100)
    document = Reader("--data", "utf-8", False, print).open(str(tmp_path / "text")).documents[0]
    parts = [ids for ids, _ in kinds[kind].read(document)]
    assert len(parts) > 30 and np.concatenate(parts).tolist() == kinds[kind].encode(text).tolist()


# -- what is refused


def test_without_the_library_a_sentence_names_the_extra(definitions, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    made = from_json(HuggingFaceTokenizer(definitions["bytes"], 300).to_json())
    assert made.vocab == 300  # all that is needed to build the model
    for use in (lambda: made.encode("a"), lambda: made.decode([1]), made.start, made.check):
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value) == 'the tokens of this model need the tokenizers library: pip install "minitv[hf]"'


def test_a_character_without_a_token_is_not_dropped():
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.train_from_iterator(["abc abc"], library.trainers.BpeTrainer(show_progress=False))
    made = HuggingFaceTokenizer(made.to_str(), 10)
    assert len(made.encode("abc\n abc")) == 2
    with pytest.raises(UserError, match=r"the character 'z' \(U\+007A\) at offset 4 is unknown: the model's tokenizer has no"):
        made.encode("abc zab")
    with pytest.raises(UserError, match=r"'\\udc80' \(U\+DC80\) at offset 1 is a lone surrogate"):
        made.encode("a\udc80")
    words = HuggingFaceTokenizer(library.Tokenizer(library.models.WordLevel({"a": 0})).to_str(), 10)
    with pytest.raises(UserError, match="the model's tokenizer cannot read this text: "):
        words.encode("b")


@pytest.mark.parametrize("definition", ["", "{}", "[]", "3", "{", '{"model": 1}', "[" * 10**5, '{"a":' * 10**5, "\x00", "null"])
def test_what_is_no_tokenizer_is_a_sentence(definition):
    pytest.importorskip("tokenizers")
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: the tokenizers library cannot read it: "):
        HuggingFaceTokenizer(definition, 10).check()


def test_a_tokenizer_of_a_larger_model(definitions):
    with pytest.raises(CheckpointError, match=r"ids up to 299, and the model knows 299, from 0 to 298: this tokenizer is of"):
        HuggingFaceTokenizer(definitions["bytes"], 299).check()
    with pytest.raises(UserError, match=r"the ids must lie in \[0, 300\), got 300 to 300"):
        HuggingFaceTokenizer(definitions["bytes"], 300).decode([300])


@pytest.mark.parametrize("stored", [
    {"kind": "ids"}, {"kind": "ids", "vocab": 0}, {"kind": "ids", "vocab": True}, {"kind": "ids", "vocab": 2**31},
    {"kind": "ids", "vocab": 3, "more": 1}, {"kind": "ids", "vocab": 3, "definition": "{}", "first": None},
    {"kind": "huggingface", "vocab": 3},
    {"kind": "huggingface", "vocab": 3, "definition": 3, "first": None},
    {"kind": "huggingface", "vocab": 3, "definition": "{}", "first": 3},
    {"kind": "huggingface", "vocab": 3, "definition": "{}", "first": True},
    {"kind": "huggingface", "vocab": 0, "definition": "{}", "first": None},
])
def test_damaged_json_is_refused(stored):
    with pytest.raises(CheckpointError, match="the stored tokenizer is not one that minitv writes"):
        from_json(stored)


# -- ids


@given(ids=st.lists(st.integers(0, 49), min_size=1), sizes=st.lists(st.integers(1, 5), min_size=1), cut=st.integers(0, 60),
       space=st.sampled_from([" ", "\n", " \t "]))
def test_ids_come_back_in_blocks_and_in_parts(ids, sizes, cut, space):
    class Blocks:
        where = "--data: x"

        def texts(self):
            rest, size = text, itertools.cycle(sizes)
            while rest:
                block, rest = rest[:(n := next(size))], rest[n:]
                yield block

    made, text = IdTokenizer(50), space.join(map(str, ids))
    assert made.encode(text).tolist() == ids and made.decode(ids) == " ".join(map(str, ids))
    assert made.length(text) == len(ids)
    parts = [np.concatenate([some for some, _ in made.read(Blocks(), *part)]).tolist() for part in ((0, cut), (cut, None))]
    assert parts[0] + parts[1] == ids  # no number is cut in two
    assert parts[0] == made.encode(text[:cut]).tolist() or not text[cut - 1:cut + 1].isspace()
    assert "".join(spoken(made.decoder(), ids)) == " " + made.decode(ids)


@pytest.mark.parametrize("text, word, offset", [("1 50", "'50'", 2), ("-1", "'-1'", 0), ("1 2.5", "'2.5'", 2), ("٣", "'٣'", 0),
                                                ("the fox", "'the'", 0), ("9" * 5000, "'999", 0)])
def test_what_is_no_id_is_named(text, word, offset):
    with pytest.raises(UserError, match="from 0 to 49 with spaces between them") as error:
        IdTokenizer(50).encode(text)
    assert str(error.value).startswith(word) and f"at offset {offset} is no id: this model came with" in str(error.value)


def test_ids_begin_with_a_prompt():
    made = IdTokenizer(50)
    assert made.start().tolist() == [0] == made.start(" ").tolist() and made.start("7 8").tolist() == [7, 8]
    assert from_json(made.to_json()).vocab == 50


# -- a run


def write(directory, made, **data):
    """A run whose model came from elsewhere."""
    experiment = variants.load("transformer").configure(**SMALL, tokenizer=made.kind, **data)
    model = models.build("transformer", made.vocab, np.float32, **SMALL)
    state = {"config": experiment.to_json(), "tokenizer": made.to_json(), "corpus_sha256": None, "step": 0, "best_loss": None,
             "elapsed_s": 0.0, "threads": 1}
    checkpoint.save(directory, "last", model=model.state(), optimizer={}, state=state)
    return str(directory)


@pytest.fixture
def run(definitions, tmp_path):
    return write(tmp_path / "run", HuggingFaceTokenizer(definitions["bytes"], 310))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS * 30, encoding="utf-8")
    return str(tmp_path / "text.txt")


def said(capsys, *argv, code=0):
    assert main(list(argv)) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_a_sample_is_text(run, capsys):
    out = said(capsys, "sample", run, "--prompt", "The naïve ", "--tokens", "12")
    assert out.startswith("The naïve ") and out == "The naïve " + load(run).write("The naïve ", tokens=12) + "\n"
    assert load(run).write("é", tokens=4, seed=3) != load(run).write("e", tokens=4, seed=3)


def test_ids_that_spell_nothing_are_not_written(definitions, tmp_path):
    """A model whose embedding has more rows than its tokenizer has tokens, as some have."""
    run = load(write(tmp_path / "run", HuggingFaceTokenizer(definitions["bytes"], 310)))
    assert run.tokenizer.spelled == 300
    run.model.embed.weight.assign_(np.where(np.arange(310)[:, None] < 300, run.model.embed.weight.numpy(), 9))
    decoded = []
    decode = HuggingFaceTokenizer.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceTokenizer, "decode", lambda self, ids: decoded.extend(ids) or decode(self, ids))
        run.write("the", tokens=50)
    assert decoded and max(decoded) < 300


def test_bits_are_of_characters(run, text, capsys):
    evaluation = load(run).evaluate(WORDS)
    tokens = len(evaluation.ids)
    assert evaluation.bits_per_character == pytest.approx(evaluation.loss / math.log(2) * tokens / len(WORDS)) and tokens < 90
    out = said(capsys, "eval", run, "--data", text)
    assert f"{text}: {30 * len(WORDS) / 1000:.1f}k characters" in out
    table = said(capsys, "eval", run, "--text", "The 😀fox", "--per-character").split("half a bit\n")[1].splitlines()
    places = [(int(line.split()[0]), line.split("'")[1]) for line in table]
    assert "".join(piece for _, piece in places) == "The 😀fox" and places[-1][0] + len(places[-1][1]) == len("The 😀fox")
    assert "--text: the text has 0 tokens" in said(capsys, "eval", run, "--text", "", code=2)


def test_a_run_goes_on_from_it_with_its_tokens(run, text, tmp_path, capsys):
    new = str(tmp_path / "tuned")
    options = ("--steps", "2", "--eval-every", "2", "--sample-tokens", "5", "--batch", "2", "--warmup", "1", "--threads", "1")
    assert main(["train", "--init-from", run, "--data", text, "--out", new, *options]) == 0
    capsys.readouterr()
    stored = json.loads((tmp_path / "tuned" / "last" / "state.json").read_text())
    assert stored["tokenizer"] == load(run).tokenizer.to_json() and stored["config"]["data"]["tokenizer"] == "huggingface"
    header = json.loads((tmp_path / "tuned" / "log.jsonl").read_text().splitlines()[0])
    per_char = header["tokens_per_char"]["training"]
    assert per_char == pytest.approx(header["corpus"]["training_tokens"] / int(0.9 * 30 * len(WORDS))) and 0.2 < per_char < 1
    assert "huggingface" in said(capsys, "train", "--init-from", run, "--data", text, "--tokenizer", "char", code=2)
    assert said(capsys, "train", "--tokenizer", "huggingface", "--data", text, code=2) == (
        "minitv: error: --tokenizer huggingface: such tokens come with the weights of a model that was imported, which "
        "--init-from names; allowed without it: char, byte\n")


def test_a_large_text_is_encoded_once(run, text, tmp_path, monkeypatch):
    from autograd import private
    from minitv import corpus as corpora

    monkeypatch.setattr(private, "places", lambda name: [tmp_path / "kept"])
    monkeypatch.setattr(corpora, "SMALL", 0)
    saved, told = load(run).tokenizer, []
    first = open_corpus(text, saved=saved, tell=told.append)
    assert saved.decode(first.training) + saved.decode(first.held_out) == WORDS * 30 and first.training.dtype == np.uint16
    monkeypatch.setattr(HuggingFaceTokenizer, "read", lambda *_: pytest.fail("it was encoded again"))
    again = open_corpus(text, saved=saved, tell=told.append)
    assert again.training.tolist() == first.training.tolist() and again.tokens_per_char == first.tokens_per_char
    assert len(told) == 1 and len(first.baselines) == 6


def test_a_page_shows_its_words(run, text, tmp_path, capsys):
    pytest.importorskip("plotly")
    out = tmp_path / "page.html"
    said(capsys, "explore", run, "--text", text, "--out", str(out))
    assert "quick" in out.read_text("utf-8")


def test_ids_in_and_ids_out(tmp_path, capsys):
    run = write(tmp_path / "run", IdTokenizer(50))
    out = said(capsys, "sample", run, "--prompt", "3 4 5", "--tokens", "6")
    assert out.startswith("3 4 5 ") and len(out.split()) == 9 and all(0 <= int(word) < 50 for word in out.split())
    assert "--text: 4 characters" in said(capsys, "eval", run, "--text", "1 2 3 49")
    assert "is no id" in said(capsys, "sample", run, "--prompt", "The fox", code=2)
    (tmp_path / "ids.txt").write_text(" ".join(str(i * i % 50) for i in range(300)))
    assert main(["train", "--init-from", run, "--data", str(tmp_path / "ids.txt"), "--out", str(tmp_path / "tuned"), "--steps",
                 "1", "--batch", "2", "--threads", "1", "--warmup", "1"]) == 0
    assert load(str(tmp_path / "tuned")).tokenizer.vocab == 50
