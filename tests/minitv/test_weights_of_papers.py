"""Weights of RoFormer, Reformer, RetNet and wav2vec 2.0: what is done with them, what export says, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from autograd import no_grad
from minitv import checkpoint, cli, exchange, variants
from minitv.audio import read_sound, write_wav
from minitv.exchange import CONFIG, WEIGHTS, find, import_weights
from minitv.goldens import FOLDER
from minitv.options import ExportOptions, ImportOptions
from minitv.sample import load
from minitv.task import NOTHING
from minitv.transcribe import Recogniser

GOLDENS = FOLDER / "weights"
NAMES = ["reformer", "reformer-lsh", "retnet", "roformer", "roformer-encoder", "wav2vec2-conformer", "wav2vec2-conformer-layer"]


@pytest.fixture
def folder(tmp_path):
    """A copy of a model's folder, by its name, with other entries of config.json, and other arrays or without them."""
    def copy(name: str, arrays: dict | None = None, **entries) -> Path:
        place = tmp_path / name
        shutil.copytree(GOLDENS / name, place)
        config = json.loads((place / CONFIG).read_text()) | entries
        (place / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
        if arrays:
            kept = safetensors.numpy.load_file(place / WEIGHTS) | arrays
            safetensors.numpy.save_file({key: value for key, value in kept.items() if value is not None}, place / WEIGHTS)
        return place

    return copy


@pytest.fixture
def imported(folder, tmp_path):
    """The run of a model's folder."""
    def run(name: str, **change) -> str:
        return str(import_weights(str(folder(name, **change)), ImportOptions(out=str(tmp_path / "run")))[0])

    return run


def read(name: str, directory: str, length: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The beginning of what the model reads in the golden file, and what the run's model says of it."""
    expected = np.load(GOLDENS / name / "expected.npz")
    inputs = (expected["ids"] if "ids" in expected else expected["samples"])[:, :length]
    with no_grad():
        return inputs, load(directory).model(inputs).numpy()


# -- out ---------------------------------------------------------------------------------------------------------------
def read_by_torchscale(folder: Path):
    """The decoder of a folder, as minitv/weights/retnet.py says that it is read."""
    torch = pytest.importorskip("torch", reason="the package torch is not here")
    config = pytest.importorskip("torchscale.architecture.config", reason="the package torchscale is not here").RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    config = config(**json.loads((folder / CONFIG).read_text()))
    model = RetNetDecoder(config, embed_tokens=torch.nn.Embedding(config.vocab_size, config.decoder_embed_dim))
    model.load_state_dict({key: torch.from_numpy(array)
                           for key, array in safetensors.numpy.load_file(folder / WEIGHTS).items()})
    return lambda ids: model.eval()(ids)[0]


def read_by_transformers(folder: Path, kind: str):
    """The model of a folder; no array in it is left over, and those that are not in it change nothing."""
    transformers = pytest.importorskip("transformers", reason="the package transformers is not here")
    model, notes = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not notes["unexpected_keys"] and not notes["mismatched_keys"]
    left = ("pos_conv_embed", "lm_head.bias", "cls.predictions.bias", "num_batches_tracked", "masked_spec_embed")
    assert all(any(part in key for part in left) for key in notes["missing_keys"])
    return lambda x: model.eval()(x[..., 0].float() if x.is_floating_point() else x).logits


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_the_library_of_the_paper_reads_what_is_exported(name, imported, tmp_path):
    run = imported(name)
    out, architecture = exchange.export(run, ExportOptions(out=str(tmp_path / "out")))
    model = read_by_torchscale(out) if name == "retnet" else read_by_transformers(out, architecture.task_class)
    import torch

    inputs, ours = read(name, run, 4 if name.startswith("reformer") else None)  # a chunk shows all, and nothing is drawn
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(inputs)).numpy(), ours, rtol=1e-4, atol=1e-4)


def made_here(tmp_path: Path, variant: str, **values) -> str:
    """A run that has done no step, of a small model whose tokens are ids."""
    experiment = variants.load(variant).configure(**{"width": 16, "layers": 1, "context": 8, **values})
    state = {"config": experiment.to_json(), "vocab": 5, "step": 0, "best_loss": None, "elapsed_s": 0.0, "threads": 1,
             "tokenizer": {"kind": "ids", "vocab": 5}}
    checkpoint.save(tmp_path / "made", "last", model=experiment.build(5).state(), optimizer={}, state=state)
    return str(tmp_path / "made")


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_that_was_made_here_goes_out_and_comes_back(bias, tmp_path):
    """Biases that it has not are written as zeros."""
    run = made_here(tmp_path, "roformer", norms="after", output="bert", segments=1, embed_norm=True, bias=bias, tied=False)
    out, _ = exchange.export(run, ExportOptions(out=str(tmp_path / "out")))
    back, _ = import_weights(str(out), ImportOptions(out=str(tmp_path / "back")))
    ids = np.arange(5)[None]
    with no_grad():
        ours, theirs = (load(str(place)).model(ids).numpy() for place in (run, back))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("variant", "values", "said"), [
    ("roformer", dict(norms="after", output="bert", segments=2, embed_norm=True, bias=True, pairing="half"),
     "--pairing is half, and there it is always interleaved"),
    ("roformer-encoder", {}, "--embed-norm is off, and there it is always on"),
    ("roformer-encoder", dict(norms="after", output="bert", embed_norm=True, bias=True),
     "--segments is 0, and there is always one vector at least"),
    ("retnet", dict(norm="rms_norm", head_norm="rms_norm", ffn="glu", decay="range"),
     "--decay is range, and there it is always powers"),
    ("reformer", dict(attend="chunks", wrap="previous", correction=False, streams="concat", tied=False, bias=True,
                      attention_bias=False, head_bias=True, mixers="lsh,full", layers=2),
     "--mixers has full, allowed there: lsh, chunked"),
    ("reformer", {}, "--attend is bucket, and there it is always chunks"),
    ("conformer", {}, "--subsampling is 4, and there it is always wave"),
    ("conformer", dict(subsampling="wave", final_norm=True, convolution_bias=False, conv_norm="batch", bias=True,
                       context=2**20, frames="samples", rate=16_000), "--normalise is corpus, and there it is always utt")])
def test_what_an_architecture_has_no_word_for_is_refused_before_anything_is_written(variant, values, said, tmp_path):
    run = made_here(tmp_path, variant, **values)
    with pytest.raises(exchange.UserError) as error:
        exchange.export(run, ExportOptions(out=str(tmp_path / "out")))
    assert said in str(error.value) and not (tmp_path / "out").exists()


# -- in ----------------------------------------------------------------------------------------------------------------
def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize(("name", "change", "said"), [
    ("roformer", dict(rotary_value=True), "rotary_value is true, allowed: false, because values are not turned here"),
    ("roformer", dict(embedding_size=4), "embedding_size is 4, allowed: hidden_size, 8, because no matrix leads from the"),
    ("roformer", dict(is_decoder="yes"), "is_decoder is 'yes', allowed: true"),
    ("roformer", dict(add_cross_attention=True), "add_cross_attention is true, allowed: false"),
    ("roformer", dict(max_position_embeddings=13), "roformer.encoder.embed_positions.weight is not the table of sines"),
    ("roformer", dict(max_position_embeddings=2**20), "roformer.encoder.embed_positions.weight is not the table of sines"),
    ("roformer", dict(arrays={"roformer.encoder.embed_positions.weight": drawn(12, 4)}), "is not the table of sines that"),
    ("roformer", dict(type_vocab_size=0), "type_vocab_size is 0, allowed: a positive integer"),
    ("roformer", dict(tie_word_embeddings=True), "and they differ"),
    ("roformer-encoder", dict(arrays={"cls.predictions.bias": None}), "missing: cls.predictions.bias"),
    ("roformer-encoder", dict(model_type="roformer-encoder"), "model_type is 'roformer-encoder', allowed: "),
    ("reformer", dict(is_decoder=False), "is_decoder is false, allowed: true, because this model sees the past alone"),
    ("reformer", dict(attn_layers=["lsh", "far"]), "attn_layers is ['lsh', 'far'], allowed: a list of lsh and local"),
    ("reformer", dict(attn_layers=[["lsh"]]), "attn_layers is [['lsh']], allowed: a list of lsh and local"),
    ("reformer", dict(num_hidden_layers=3), "num_hidden_layers is 3, and attn_layers has 2"),
    ("reformer", dict(num_buckets=[4, 3]), "num_buckets is [4, 3], allowed: even numbers"),
    ("reformer", dict(num_buckets=[]), "num_buckets is [], allowed: a list of 1 to 8 positive integers"),
    ("reformer", dict(axial_pos_shape=[3, 2]), "--axial: '3x2', allowed: two numbers or more such as 8x8, whose product is"),
    ("reformer", dict(axial_pos_shape=[2] * 9), "axial_pos_shape is [2, 2, 2, 2, 2, 2, 2, 2, 2], allowed: a list of 1 to 8"),
    ("reformer", dict(num_buckets=[2**30] * 9), "allowed: a list of 1 to 8 positive integers below 2**31"),
    ("reformer", dict(num_buckets=[2**30] * 8), "buckets: "),
    ("reformer", dict(axial_pos_embds_dim=[4, 5]), "--axial-widths: '4,5', allowed: 2 positive integers separated by commas"),
    ("reformer", dict(lsh_num_chunks_before=2), "lsh_num_chunks_before is 2, allowed: 1, because a chunk sees itself and"),
    ("reformer", dict(hash_seed=1), "hash_seed is 1, allowed: null, because numbers that torch draws from a seed"),
    ("reformer", dict(tie_word_embeddings=True), "tie_word_embeddings is true, allowed: false, because its head reads two"),
    ("retnet", dict(decoder_retention_heads="absent"), "model_type is not there, allowed: "),
    ("retnet", dict(deepnorm=True, subln=False), "deepnorm is true, allowed: false, because x is not multiplied where"),
    ("retnet", dict(moe_freq=2), "moe_freq is 2, allowed: 0, because there are no experts here"),
    ("retnet", dict(no_scale_embedding=False), "no_scale_embedding is false, allowed: true, because the embedding is not"),
    ("retnet", dict(vocab_size=-1), "vocab_size is -1, allowed: a positive integer"),
    ("retnet", dict(arrays={"retnet_rel_pos.decay": drawn(2)}), "retnet_rel_pos.decay is not what torchscale 0.3.0 computes"),
    ("wav2vec2-conformer", dict(position_embeddings_type="rotary"), "position_embeddings_type is 'rotary', allowed: "),
    ("wav2vec2-conformer", dict(add_adapter=True), "add_adapter is true, allowed: false, because there are no convolutions"),
    ("wav2vec2-conformer", dict(pad_token_id=2), "pad_token_id is 2, allowed: 0, because class 0 is CTC's blank here"),
    ("wav2vec2-conformer", dict(layer_norm_eps=1e-6), "layer_norm_eps is 1e-06, allowed: 1e-05, because it is that of a part"),
    ("wav2vec2-conformer", dict(conv_stride=[2]), "--wave-channels, --wave-kernels and --wave-strides: they have 2, 2, 1"),
    ("wav2vec2-conformer", dict(conv_dim=[4, 0]), "conv_dim is [4, 0], allowed: 1 to 32 integers from 1 to 2**20"),
    ("wav2vec2-conformer", dict(conv_depthwise_kernel_size=4), "--kernel: 4 taps have no middle, allowed: an odd number"),
    ("wav2vec2-conformer", dict(arrays={"lm_head.weight": None, "lm_head.bias": None}),
     "missing: lm_head.weight, lm_head.bias")])
def test_what_is_not_known_here_is_refused(name, change, said, folder):
    with pytest.raises(exchange.UserError) as error:
        find(str(folder(name, **change)))
    assert said in str(error.value)


def test_a_file_may_have_the_tied_head_once_more(folder):
    """As files of earlier versions of transformers do."""
    arrays = safetensors.numpy.load_file(GOLDENS / "roformer-encoder" / WEIGHTS)
    copies = {"cls.predictions.decoder.weight": arrays["roformer.embeddings.word_embeddings.weight"],
              "cls.predictions.decoder.bias": arrays["cls.predictions.bias"]}
    found = find(str(folder("roformer-encoder", arrays=copies)))
    assert found.experiment.model.tied and not set(copies) & set(found.stored)


@pytest.mark.parametrize(("length", "chunk", "buckets", "factors"), [(4096, 64, 128, "128"), (16384, 8, 4096, "64,64"),
                                                                     (64, 64, 2, "2"), (65536, 4, 32768, "128,256")])
def test_without_a_number_of_buckets_it_is_what_transformers_takes_for_the_longest_text(length, chunk, buckets, factors):
    """2^k just below twice the number of chunks, in two factors above a limit: its ``_set_num_buckets``."""
    from minitv.weights.reformer import read_buckets

    found = read_buckets({"max_position_embeddings": length, "lsh_attn_chunk_length": chunk, "num_buckets": None})
    assert found == {"buckets": buckets, "factors": factors}


# -- what is done with them --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["roformer", "reformer", "retnet"])
def test_ids_are_written(name, imported, capsys):
    run = imported(name)
    capsys.readouterr()
    assert cli.main(["sample", run, "--prompt", "3 1 4", "--tokens", "4", "--temperature", "0"]) == 0
    text = capsys.readouterr().out
    assert len(text.split()) >= 7 and all(word.isdigit() for word in text.split()[:7])


def test_an_encoder_guesses_what_its_own_mask_hides(imported, tmp_path):
    directory = imported("roformer-encoder", mask_token_id=4)
    run = load(directory)
    ids = np.random.default_rng(0).choice([1, 2, 3, 5, 6, 7, 8, 9, 10], 400)
    out, _ = exchange.export(directory, ExportOptions(out=str(tmp_path / "out")))
    assert json.loads((out / CONFIG).read_text())["mask_token_id"] == 4
    batch = run.experiment.task.asked_of(run.experiment.data, run.tokenizer, ids)
    asked = batch.labels != NOTHING
    assert asked.sum() == 60 and (batch.inputs[asked] == 4).sum() > 30 and (batch.inputs[~asked] == ids[~asked[0]]).all()


def test_an_encoder_that_came_without_its_mask_is_not_asked(imported, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("1 2 3 " * 99)
    argv = ["train", "--init-from", imported("roformer-encoder"), "--data", str(tmp_path / "ids.txt")]
    assert cli.main([*argv, "--out", str(tmp_path / "more")]) == 2
    assert "the model came without the id of its mask, which stands for hidden tokens" in capsys.readouterr().err


@pytest.mark.full
def test_an_encoder_goes_on_learning(imported, tmp_path):
    (tmp_path / "ids.txt").write_text(" ".join(str(i % 10) for i in range(400)))
    run = imported("roformer-encoder", mask_token_id=10)
    assert cli.main(["train", "--init-from", run, "--data", str(tmp_path / "ids.txt"), "--steps", "2", "--eval-every", "0",
                     "--context", "12", "--threads", "1", "--out", str(tmp_path / "more")]) == 0
    experiment = load(str(tmp_path / "more")).experiment
    assert experiment.mixer.norms == "after" and experiment.data.tokenizer == "ids"


def units(*names: str) -> str:
    return json.dumps({name: i for i, name in enumerate(names)})


def test_a_recording_is_written_down(imported, folder, tmp_path, capsys):
    """By the units of vocab.json, as transformers would have it; without the file by the numbers of the classes."""
    sound = np.random.default_rng(0).normal(size=400).astype(np.float32).clip(-1, 1) * 0.3
    write_wav(tmp_path / "a.wav", sound, 16_000)
    place = folder("wav2vec2-conformer")
    (place / "vocab.json").write_text(units("<pad>", "|", "A", "B", "C"))
    run, _ = import_weights(str(place), ImportOptions(out=str(tmp_path / "heard")))
    recogniser = Recogniser(load(str(run)))
    assert recogniser.alphabet.units == (" ", "A", "B", "C") and recogniser.front.rate == 16_000
    normalised = (sound - sound.mean()) / sound.std()
    with no_grad():
        logits = recogniser.model(normalised[None, :, None]).numpy()[0]
    np.testing.assert_allclose(recogniser.logits(sound), logits, rtol=1e-3, atol=1e-4)
    best = [k for i, k in enumerate(logits.argmax(-1)) if k and (not i or k != logits[i - 1].argmax())]
    assert recogniser.transcript(sound) == " ".join("".join(" ABC"[k - 1] for k in best).split())
    drawn = importlib.util.find_spec("matplotlib") is not None
    capsys.readouterr()
    picture = ["--picture", str(tmp_path / "heard.png")] if drawn else []
    assert cli.main(["transcribe", str(run), str(tmp_path / "a.wav"), *picture]) == 0
    assert capsys.readouterr().out.strip() == recogniser.transcript(read_sound(tmp_path / "a.wav", 16_000)[0]).strip()
    assert (tmp_path / "heard.png").exists() == drawn
    out, _ = exchange.export(str(run), ExportOptions(out=str(tmp_path / "out")))
    assert json.loads((out / "vocab.json").read_text()) == json.loads((place / "vocab.json").read_text())
    shutil.rmtree(place)
    numbers = Recogniser(load(imported("wav2vec2-conformer"))).alphabet
    assert numbers.units == ("1", "2", "3", "4") and numbers.kind == "word"


@pytest.mark.parametrize(("text", "said"), [
    ("[1]", "is no table of units"), ("{", "is no table of units"),
    (units("<pad>", "A"), "does not name each of the classes 1")])
def test_a_vocabulary_that_is_none_is_refused(text, said, folder, tmp_path):
    place = folder("wav2vec2-conformer")
    (place / "vocab.json").write_text(text)
    with pytest.raises(exchange.UserError, match=said):
        import_weights(str(place), ImportOptions(out=str(tmp_path / "run")))
    with open(place / "vocab.json", "wb") as file:
        file.truncate(2**36)  # it takes no room on the disk
    with pytest.raises(exchange.UserError, match=r"vocab\.json: it has 68719476736 bytes, allowed are 10000000"):
        import_weights(str(place), ImportOptions(out=str(tmp_path / "run")))
