"""Weights of other programs: what they compute, what export writes, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import minitv
from autograd import cross_entropy, no_grad
from autograd.random import Random
from minitv import checkpoint, exchange, tensors, weights
from minitv.cli import main
from minitv.errors import CheckpointError, UserError
from minitv.exchange import CONFIG, INDEX, TOKENIZER, WEIGHTS, Pickled, find, import_weights
from minitv.goldens import FOLDER, close
from minitv.options import ExportOptions, ImportOptions
from minitv.sample import load
from tests.minitv.models import configure
from tests.minitv.test_weights_of_papers import NAMES as ELSEWHERE

GOLDENS = FOLDER / "weights"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
LLAMA = dict(norm="rms_norm", ffn_gate=True, activation="silu")  # what a model of ours must have to be one


@pytest.fixture
def folder(tmp_path):
    """A copy of a model's folder, by its name."""
    def copy(name: str = "gpt2") -> Path:
        return Path(shutil.copytree(GOLDENS / name, tmp_path / name))

    return copy


def built(found: exchange.Found, dtype=np.float64):
    """The model of a folder, with its weights."""
    experiment = found.experiment
    model = experiment.variant.build(experiment.model, experiment.mixer, found.vocab, Random(0), dtype,
                                     **experiment.task.shape(experiment.data))
    model.load({name: array.make() for name, array in found.arrays(dtype).items()})
    return model


def theirs(found: exchange.Found, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of ours, such as gradients, by their names."""
    values, there = found.experiment.values, {}
    for rule in found.rules:
        if not rule.ours or not all(name in arrays for name in rule.ours):  # tables, and buffers without gradients
            continue
        there |= dict(zip(rule.theirs, rule.way.write([arrays[name] for name in rule.ours], values), strict=True))
    return there


# -- what they compute -------------------------------------------------------------------------------------------------
def test_every_architecture_has_a_golden_model():
    assert {find(str(GOLDENS / name)).architecture.name for name in NAMES} == set(weights.architectures())


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_computes_what_the_other_program_computes(name, forms_unless_full):
    found = find(str(GOLDENS / name))
    expected = dict(np.load(GOLDENS / name / "expected.npz"))
    model = built(found)
    for key, buffer in model.named_buffers():
        if f"buffer/{key}" in expected:
            buffer.assign_(expected[f"buffer/{key}"])
    logits = model(expected["ids"] if "ids" in expected else expected["samples"])
    close(logits.numpy(), expected["logits"], np.float64, "logits")
    if "hidden" in expected:
        with no_grad():
            close(model.hidden(expected["ids"]).numpy(), expected["hidden"], np.float64, "what the last layer gives")
    loss = cross_entropy(logits, expected["labels"])
    loss.backward()
    close(loss.numpy(), expected["loss"], np.float64, "loss")
    gradients = theirs(found, {key: parameter.grad.numpy() for key, parameter in model.named_parameters()})
    wanted = {key.removeprefix("grad/"): value for key, value in expected.items() if key.startswith("grad/")}
    assert set(gradients) == set(wanted)
    for key, gradient in gradients.items():
        close(gradient, wanted[key], np.float64, f"gradient of {key}")


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_reads_in_parts_as_the_other_program_does(name, forms_unless_full):
    expected = dict(np.load(GOLDENS / name / "expected.npz"))
    if "cached" not in expected:
        pytest.skip("it does not go on from a past")
    model, parts = built(find(str(GOLDENS / name))), []
    with no_grad():
        state = model.init_state(len(expected["ids"]))
        for part in np.split(expected["ids"], [4, 5], axis=1):
            logits, state = model.prefill(part, state)
            parts.append(logits.numpy())
    close(np.concatenate(parts, axis=1), expected["cached"], np.float64, "logits of parts")


# -- in and out --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_export_writes_what_was_imported_bit_for_bit(name, tmp_path):
    run, _ = import_weights(str(GOLDENS / name), ImportOptions(out=str(tmp_path / "run")))
    out, architecture = exchange.export(str(run), ExportOptions(out=str(tmp_path / "out")))
    before, after = (safetensors.numpy.load_file(place / WEIGHTS) for place in (GOLDENS / name, out))
    unread = {key for key in before if any(re.fullmatch(pattern, key) for pattern in architecture.ignored_arrays)}
    assert after.keys() == before.keys() - (unread - after.keys())
    for key, array in after.items():
        np.testing.assert_array_equal(array, before[key].astype(np.float32), strict=True)
    again, second = import_weights(str(out), ImportOptions(out=str(tmp_path / "again")))
    assert second.architecture is architecture
    assert second.experiment.identity("model", "mixer", "data") == find(str(GOLDENS / name)).experiment.identity(
        "model", "mixer", "data")
    first = checkpoint.load(run).model
    assert all(np.array_equal(array, first[key]) for key, array in checkpoint.load(again).model.items())


def test_a_model_without_biases_is_written_with_zeros(tmp_path):
    made = minitv_run(tmp_path, "transformer", bias=False, activation="gelu_tanh")
    out, _ = exchange.export(made, ExportOptions(out=str(tmp_path / "out")))
    ids = np.arange(6)[None]
    with no_grad():
        np.testing.assert_array_equal(built(find(str(out)), np.float32)(ids).numpy(), load(made).model(ids).numpy())


def minitv_run(tmp_path: Path, variant: str, **values) -> str:
    """A run that has done no step, of a small model."""
    heads = {} if variant == "rwkv" else dict(heads=2)
    experiment = configure(variant, **{"width": 16, "layers": 1, "context": 8, **heads, **values})
    state = {"config": experiment.to_json(), "tokenizer": {"kind": "byte"}, "corpus_sha256": None, "vocab": 256, "step": 0,
             "best_loss": None, "elapsed_s": 0.0, "threads": 1}
    checkpoint.save(tmp_path / "made", "last", model=experiment.build(256).state(), optimizer={}, state=state)
    return str(tmp_path / "made")


@pytest.mark.parametrize("name", sorted({*NAMES} - {*ELSEWHERE}))
def test_transformers_reads_what_export_writes(name, tmp_path):
    run, _ = import_weights(str(GOLDENS / name), ImportOptions(out=str(tmp_path / "run")))
    read_by_transformers(str(run), tmp_path / "out", np.load(GOLDENS / name / "expected.npz")["ids"])


@pytest.mark.parametrize("variant, values", [
    ("transformer", dict(activation="relu", tied=False)), ("grouped-query", LLAMA | dict(positions="rope", bias=True)),
    ("roformer", LLAMA | dict(kv_heads=1, scaling="linear", scaling_factor=2.0)), ("rwkv", dict(layers=2))])
def test_transformers_reads_models_that_were_made_here(variant, values, tmp_path):
    read_by_transformers(minitv_run(tmp_path, variant, **values), tmp_path / "out", np.arange(6)[None])


def read_by_transformers(run: str, out: Path, ids: np.ndarray) -> None:
    """Export a run; transformers finds all that it looks for in the files, nothing else, and gives the same logits."""
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    out, architecture = exchange.export(run, ExportOptions(out=str(out)))
    model, report = getattr(transformers, architecture.task_class).from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad(), no_grad():
        wanted = model.eval()(torch.from_numpy(ids)).logits.numpy()
        close(load(run).model(ids).numpy(), wanted.astype(np.float64), np.float32, "logits")


@pytest.mark.parametrize("variant, values", [("roformer", dict(kv_heads=1)), ("transformer", dict(positions="rope")),
                                             ("multi-query", dict(positions="rope"))])
def test_pairs_of_neighbours_are_written_half_a_head_apart(tmp_path, variant, values):
    """A model that was trained here is the same one there, although its rows of queries and keys have another order."""
    made = minitv_run(tmp_path, variant, **LLAMA, **values)
    out, architecture = exchange.export(made, ExportOptions(out=str(tmp_path / "out")))
    ids = np.arange(6)[None]
    with no_grad():
        wanted = load(made).model(ids).numpy().astype(np.float64)
        close(built(find(str(out)), np.float32)(ids).numpy(), wanted, np.float32, "logits")
    assert architecture.name == "llama"


# -- other files of the same model -------------------------------------------------------------------------------------
def rewritten(folder: Path, change) -> None:
    """Write the weights of a folder anew, as ``change(arrays)`` gives them."""
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(folder / WEIGHTS)), folder / WEIGHTS)


def configured(folder: Path, **entries) -> Path:
    """Give config.json other entries."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | entries))
    return folder


def made(folder: Path) -> dict[str, np.ndarray]:
    return {name: array.make() for name, array in find(str(folder)).arrays().items()}


def same(folder: Path, **tolerance) -> None:
    """The folder holds the model of the golden one."""
    before, after = made(GOLDENS / folder.name), made(folder)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, **(tolerance or dict(rtol=0)))


def test_a_model_in_parts_is_one(folder):
    place = folder()
    arrays = safetensors.numpy.load_file(place / WEIGHTS)
    (place / WEIGHTS).unlink()
    index = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(arrays)}
    for file in set(index.values()):
        safetensors.numpy.save_file({name: array for name, array in arrays.items() if index[name] == file}, place / file)
    (place / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    same(place)
    assert find(str(place / INDEX)).vocab == find(str(place)).vocab


def test_one_file_is_read_as_its_folder(folder):
    place = folder()
    (place / WEIGHTS).rename(place / "other.safetensors")
    assert find(str(place / "other.safetensors")).shapes == find(str(GOLDENS / "gpt2")).shapes


def test_float16_is_exact(folder):
    place = folder()
    rewritten(place, lambda arrays: {name: array.astype(np.float16) for name, array in arrays.items()})
    arrays = safetensors.numpy.load_file(place / WEIGHTS)
    np.testing.assert_array_equal(made(place)["embed.weight"], arrays["transformer.wte.weight"].astype(np.float32), strict=True)
    same(place, rtol=1e-3, atol=1e-6)


def test_bfloat16_is_exact(folder):
    place = folder()
    arrays = {name: array.astype(np.float32) for name, array in safetensors.numpy.load_file(place / WEIGHTS).items()}
    bits = {name: (array.view(np.uint32) >> 16).astype("<u2") for name, array in arrays.items()}
    header, start = {}, 0
    for name, array in bits.items():
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header).encode()
    (place / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in bits.values()))
    wanted = (bits["transformer.wte.weight"].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(made(place)["embed.weight"], wanted, strict=True)
    same(place, rtol=1e-2, atol=1e-6)


def test_names_without_the_prefix_and_masks_are_those_of_older_files(folder):
    place = folder()
    rewritten(place, lambda arrays: {name.removeprefix("transformer."): array for name, array in arrays.items()} | {
        "h.0.attn.bias": np.ones((1, 1, 16, 16)), "h.1.attn.masked_bias": np.array(-1e4)})
    same(place)


def test_a_tied_head_may_be_there_once_more_if_it_is_the_same(folder):
    place = folder()
    rewritten(place, lambda arrays: arrays | {"lm_head.weight": arrays["transformer.wte.weight"].copy()})
    same(place)
    rewritten(place, lambda arrays: arrays | {"lm_head.weight": arrays["transformer.wte.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"says that lm_head\.weight and transformer\.wte\.weight are one array"):
        find(str(place))


@pytest.mark.parametrize("name, entries", [
    ("gpt2", dict(n_special=0, predict_special_tokens=True, n_ctx=16, summary_type="cls_index", output_past=True,
                  task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}})),  # gpt2-medium, gpt2-xl
    ("gpt2", dict(_num_labels=1, is_decoder=True, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})),  # distilgpt2
    ("gpt2", dict(num_labels=2, pruned_heads={}, num_beams=1, repetition_penalty=1.0, min_length=0)),  # all entries written
    ("llama", dict(max_sequence_length=16, pad_token_id=-1, pretraining_tp=1)),  # llama-7b
    ("reformer", dict(attention_probs_dropout_prob=0.1, intermediate_size=3072, num_chunks_after=0, num_chunks_before=1,
                      output_past=True)),  # reformer-crime-and-punishment
    ("wav2vec2-conformer", dict(do_stable_layer_norm=True, hidden_dropout_prob=0.1, feat_extract_dropout=0.0,
                                use_weighted_layer_sum=False)),  # wav2vec2-conformer-rel-pos-large
])
def test_entries_of_published_descriptions_that_nothing_reads(folder, name, entries):
    assert find(str(configured(folder(name), **entries))).experiment == find(str(GOLDENS / name)).experiment


def test_angles_in_the_words_of_older_files_are_the_same(folder):
    place = folder("llama-other")
    config = json.loads((place / CONFIG).read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (place / CONFIG).write_text(json.dumps(config))
    assert find(str(place)).experiment.mixer == find(str(GOLDENS / place.name)).experiment.mixer


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, entries, sentence",
    [
        ("gpt2", dict(model_type="bert"), r"config\.json: model_type is 'bert', allowed: gpt2, llama, mistral, "),
        ("gpt2", dict(model_type=None), r"model_type is not there, allowed: gpt2"),
        ("gpt2", dict(scale_attn_weights=False), r"scale_attn_weights is false, allowed: true, because"),
        ("gpt2", dict(activation_function="mish"), r"activation_function is 'mish', allowed: silu, "),
        ("gpt2", dict(n_head=3), r"3 heads do not divide the width 8"),
        ("gpt2", dict(n_layer=10**9), r"layers: 1000000000 is too large"),
        ("gpt2", dict(n_layer=3), r"missing: transformer\.h\.2\.ln_1\.weight, .* and 4 more$"),
        ("gpt2", dict(n_layer=1), r"not known: transformer\.h\.1\..* and 4 more$"),
        ("gpt2", dict(n_positions=17), r"wpe\.weight has the shape \[16, 8\] instead of \[17, 8\]$"),
        ("gpt2", dict(vocab_size=20), r"wte\.weight has the shape \[19, 8\] instead of \[20, 8\]$"),
        ("gpt2", dict(n_embd="8"), r"n_embd is '8', allowed: a positive integer"),
        ("gpt2", dict(logit_cap=30), r"logit_cap = 30: not known of gpt2, and it may change what the model computes"),
        ("gpt2", dict(tie_word_embeddings=False), r"missing: lm_head\.weight$"),
        ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), r"rope_type is 'yarn', allowed: default, linear"),
        ("llama", dict(rope_theta=3.0), r"rope_theta is 500\.0 and 3\.0, allowed: a number"),
        ("llama", dict(head_dim=4), r"head_dim is 4 with 4 heads and hidden_size 8, allowed"),
        ("llama", dict(attention_bias=True), r"attention_bias is true and mlp_bias false, allowed: the same for both"),
        ("llama", dict(num_key_value_heads=3), r"3 heads of keys and values do not divide 4 heads, allowed: 1, 2, 4"),
        ("llama-other", dict(rope_parameters={"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0,
                                              "high_freq_factor": 4.0, "original_max_position_embeddings": 8}),
         r"low_freq_factor is 2\.0, allowed: 1,"),
        ("mistral", dict(sliding_window=8), r"sliding_window is 8 and max_position_embeddings 16, allowed: null"),
        ("rwkv", dict(attention_hidden_size=16), r"attention_hidden_size is 16, allowed: hidden_size, 8"),
        ("rwkv", dict(layer_norm_epsilon=1e-6), r"layer_norm_epsilon is 1e-06, allowed: 1e-05, because"),
    ],
)
def test_what_a_description_says_that_is_not_so_here(folder, name, entries, sentence):
    with pytest.raises(UserError, match=sentence):
        find(str(configured(folder(name), **entries)))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "rwkv.pth"])
def test_a_pickle_is_never_opened_and_the_lines_that_convert_it_are_said(folder, file):
    place = folder()
    (place / WEIGHTS).rename(place / file)
    for source in (place, place / file):
        with pytest.raises(Pickled, match=f"{file} is a pickle, which may run any program") as caught:
            find(str(source))
        assert len(caught.value.lines) == 3 and all(compile(line, "line", "exec") for line in caught.value.lines)


def test_the_lines_convert_all_parts_of_a_model_and_no_optimizer(folder, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    place = folder()
    arrays = safetensors.numpy.load_file(place / WEIGHTS)
    (place / WEIGHTS).unlink()
    torch.save({"state": {0: torch.zeros(1)}}, place / "optimizer.pt")
    for number in range(2):
        part = {name: torch.from_numpy(array) for name, array in sorted(arrays.items())[number::2]}
        torch.save(part, place / f"pytorch_model-0000{number + 1}-of-00002.bin")
    with pytest.raises(Pickled, match=r"pytorch_model-00001-of-00002\.bin is a pickle") as caught:
        find(str(place))
    monkeypatch.chdir(place)
    exec("\n".join(caught.value.lines), {})
    same(place)


def test_numbers_that_are_not_finite_are_refused_and_nothing_is_left(folder, tmp_path):
    place = folder()
    rewritten(place, lambda arrays: arrays | {"transformer.ln_f.bias": np.full(8, np.nan)})
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.bias holds numbers that are not finite"):
        import_weights(str(place), ImportOptions(out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variant, values, sentence",
    [
        ("performer", {}, r"no architecture of other programs .* is a performer, allowed: runs of "),
        ("transformer", dict(positions="rope"), r"gpt2 cannot express it: --positions is rope, and there it is always learned; "
                                                r"llama cannot express it: --ffn-gate is off, and there it is always on; --"),
        ("transformer", dict(norm="rms_norm", ffn_gate=True), r"--ffn-gate is on, and there it is always off; --norm is"),
        ("roformer", {}, r"llama cannot express it: --ffn-gate is off, .*mistral cannot express it"),
        ("roformer", dict(norm="rms_norm", ffn_gate=True, scaling="ntk", scaling_factor=2.0), r"--scaling is ntk, and its ang"),
        ("rwkv", dict(activation="relu"), r"rwkv cannot express it: --activation is relu, and there it is always relu_squared"),
    ],
)
def test_what_the_other_program_has_no_word_for(tmp_path, variant, values, sentence):
    with pytest.raises(UserError, match=sentence):
        exchange.export(minitv_run(tmp_path, variant, **values), ExportOptions(out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_are_not_written_into(tmp_path):
    run = tmp_path / "run"
    import_weights(str(GOLDENS / "gpt2"), ImportOptions(out=str(run)))
    with pytest.raises(UserError, match=r"run: there is a run in this folder, give another one"):
        import_weights(str(GOLDENS / "gpt2"), ImportOptions(out=str(run)))
    with pytest.raises(UserError, match=r"run: there is something already, give a new folder"):
        exchange.export(str(run), ExportOptions(out=str(run)))


# -- what is done with a run that came in ------------------------------------------------------------------------------
def test_the_commands_say_what_was_done(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(GOLDENS / "gpt2")]) == 0
    said = capsys.readouterr().out
    assert "gpt2, here transformer: 2.0k parameters, from F64" in said and "minitv sample runs" in said
    assert main(["export", "runs/gpt2"]) == 0
    assert "transformers.GPT2LMHeadModel.from_pretrained('runs/gpt2-huggingface')" in capsys.readouterr().out
    (tmp_path / "model.bin").write_bytes(b"")
    assert main(["import", "model.bin"]) == 2
    assert capsys.readouterr().err.splitlines()[1] == "    import torch; from safetensors.torch import save_file"


def test_a_tokenizer_beside_the_weights_comes_in_and_goes_out(folder, tmp_path, capsys):
    library = pytest.importorskip("tokenizers")
    place = folder()
    words = library.Tokenizer(library.models.WordLevel({word: i for i, word in enumerate("abcdefghijklmnopqrs")}, "a"))
    words.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    words.save(str(place / TOKENIZER))
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert main(["import", str(place), "--out", run]) == 0
    assert f"19 ids of {place / TOKENIZER}" in capsys.readouterr().out
    assert main(["sample", run, "--prompt", "b c", "--tokens", "5"]) == 0
    assert re.fullmatch(r"b c( [a-s]){5}\n", capsys.readouterr().out)
    assert main(["eval", run, "--text", "b c d e"]) == 0 and "7 characters" in capsys.readouterr().out
    assert main(["export", run, "--out", str(out)]) == 0 and "note" not in capsys.readouterr().out
    assert (out / TOKENIZER).read_bytes() == (place / TOKENIZER).read_bytes()
    assert json.loads((out / CONFIG).read_text())["bos_token_id"] == 3
    assert find(str(out)).tokenizer.to_json() == find(str(place)).tokenizer.to_json()


def test_tokens_that_no_file_describes_are_said(tmp_path, capsys):
    assert main(["export", minitv_run(tmp_path, "transformer", bias=True), "--out", str(tmp_path / "out")]) == 0
    assert "note" in (said := capsys.readouterr().out) and "no tokenizer.json is written: a token is a byte here" in said


@pytest.mark.full
@pytest.mark.parametrize("how", ["resume", "init_from"])
def test_a_training_goes_on_from_weights_that_came_in(tmp_path, how):
    """The first loss is that of the model that came in, and the moments of the optimizer begin at 0."""
    run, found = import_weights(str(GOLDENS / "gpt2"), ImportOptions(out=str(tmp_path / "run")))
    text = " ".join(map(str, np.random.default_rng(0).integers(0, found.vocab, 600)))
    (tmp_path / "ids.txt").write_text(text)
    losses = []
    options = dict(data=str(tmp_path / "ids.txt"), steps=2, eval_every=1, eval_tokens=10**6, out=str(tmp_path / "new"))
    if how == "resume":
        options |= dict(out=str(run))
    trained = minitv.train(**options, **{how: str(run)}, on_step=lambda record: losses.append(record["loss"]))
    assert trained.step == 2 and len(losses) == 2
    moments = checkpoint.load(tmp_path / ("run" if how == "resume" else "new")).optimizer
    assert moments["steps"] == 2 and any(array.any() for name, array in moments.items() if name.startswith("m."))


PEAK = """
import sys
from autograd.cpu.process import peak_mb as peak
from minitv.exchange import import_weights, export
from minitv.options import ExportOptions, ImportOptions
from minitv.sample import load
begin = peak()
import_weights(sys.argv[1], ImportOptions(out=sys.argv[2]))
import_peak = peak()
export(sys.argv[2], ExportOptions(out=sys.argv[3]))
export_peak = peak()
load(sys.argv[2])
print(begin, import_peak, export_peak, peak())
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the largest memory")
def test_weights_are_never_all_in_memory_but_in_the_model_itself(tmp_path):
    config = dict(model_type="gpt2", vocab_size=4000, n_positions=256, n_embd=1024, n_layer=5, n_head=8)
    place = tmp_path / "large"
    place.mkdir()
    (place / CONFIG).write_text(json.dumps(config))
    names = safetensors.numpy.load_file(GOLDENS / "gpt2" / WEIGHTS)
    sizes = {8: 1024, 16: 256, 19: 4000, 24: 3072, 32: 4096}
    planned = {}
    for name, array in names.items():
        for layer in range(5) if ".h.0." in name else () if ".h.1." in name else (None,):
            other = name if layer is None else name.replace(".h.0.", f".h.{layer}.")
            shape = tuple(sizes[size] for size in array.shape)
            planned[other] = tensors.Planned(shape, np.dtype(np.float32), lambda shape=shape: np.full(shape, 0.01, "f4"))
    with open(place / WEIGHTS, "wb") as file:
        for part in tensors.blocks(planned):
            file.write(part)
    size = (place / WEIGHTS).stat().st_size / 1e6
    assert size > 250
    command = [sys.executable, "-c", PEAK, place, tmp_path / "run", tmp_path / "out"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2])
    begin, imported, exported, loaded = map(float, out.stdout.split())
    assert imported - begin < 0.5 * size and exported - begin < 0.5 * size and loaded - begin < 1.5 * size
