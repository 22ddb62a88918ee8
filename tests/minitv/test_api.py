"""What `import minitv` offers to Python."""

import signal
import subprocess
import sys

import numpy as np
import pytest

import minitv
from minitv.errors import UserError

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20
SMALL = dict(context=8, layers=1, width=16, batch=4, eval_every=3, sample_tokens=4, threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "text.txt"
    path.write_text(TEXT)
    return path


def test_nothing_but_what_is_offered_is_seen_and_nothing_heavy_is_loaded():
    assert dir(minitv) == sorted(minitv.__all__)
    code = ("import sys, minitv; names = {'numpy', 'numba', 'cupy'} & set(sys.modules); assert not names, names;"
            "minitv.build, minitv.load, minitv.train")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_build_gives_a_model_with_the_options_of_the_command_line():
    model = minitv.build("rwkv", vocab=7, width=16, layers=1)
    assert model(np.zeros((2, 5), np.intp)).shape == (2, 5, 7)
    with pytest.raises(UserError, match=r"unknown option 'heads'; it is an option of .*transformer"):
        minitv.build("rwkv", vocab=7, heads=2)
    with pytest.raises(UserError, match=r"unknown variant 'rwvk'.*did you mean rwkv"):
        minitv.build("rwvk", vocab=7)


def test_a_run_is_trained_watched_stopped_and_read(data, tmp_path):
    seen = []

    def watch(record):
        seen.append(record["step"])
        return record["step"] < 5

    run = minitv.train("retnet", data=str(data), heads=2, steps=9, out=str(tmp_path / "run"), on_step=watch, **SMALL)
    assert seen == [1, 2, 3, 4, 5] and run.step == 5
    again = minitv.load(str(tmp_path / "run"))
    assert again.loss(TEXT) == run.loss(TEXT) == pytest.approx(run.evaluate(TEXT).surprise.mean())
    text = again.write("the ", tokens=6, temperature=0)
    assert len(text) == 6 and text == run.write("the ", tokens=6, temperature=0)
    with pytest.raises(UserError, match="holds a run already"):
        minitv.train("retnet", data=str(data), heads=2, steps=9, out=str(tmp_path / "run"), **SMALL)


def test_a_run_goes_on_from_the_weights_of_another_one(data, tmp_path):
    first = minitv.train("rwkv", data=str(data), steps=3, out=str(tmp_path / "first"), **SMALL)
    other = tmp_path / "other.txt"
    other.write_text("dog lazy the over jumps fox brown quick the\n" * 20)
    again = minitv.train("rwkv", data=str(other), steps=3, init_from=str(tmp_path / "first"), lr=1e-9,
                         out=str(tmp_path / "second"), **SMALL)
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    assert again.loss(TEXT) == pytest.approx(first.loss(TEXT), abs=1e-5)
    own = {name: value for name, value in SMALL.items() if name not in ("context", "layers", "width")}
    like = minitv.train(data=str(other), steps=1, init_from=str(tmp_path / "first"), out=str(tmp_path / "like"), **own)
    assert like.experiment.variant.name == "rwkv" and like.experiment.model == first.experiment.model
    with pytest.raises(UserError, match=r"--init-from .*first: its model knows \d+ different tokens, and the task mqar has 40"):
        minitv.train("rwkv", task="mqar", symbols=40, pairs=2, init_from=str(tmp_path / "first"), steps=1,
                     **{name: value for name, value in own.items() if name in ("batch", "threads")})
    same = minitv.train("rwkv", task="mqar", symbols=first.tokenizer.vocab, pairs=2, init_from=str(tmp_path / "first"), steps=1,
                        out=str(tmp_path / "recall"), lr=1e-9, eval_every=0)
    assert np.abs(same.model.embed.weight.numpy() - first.model.embed.weight.numpy()).max() < 1e-6
    wide = SMALL | dict(width=32)
    with pytest.raises(UserError, match=r"--init-from .*first: the model does not fit: wrong shape"):
        minitv.train("rwkv", data=str(other), steps=3, init_from=str(tmp_path / "first"), out=str(tmp_path / "third"), **wide)


def test_a_resumed_run_has_its_own_options(data, tmp_path):
    out = str(tmp_path / "run")
    minitv.train("retnet", data=str(data), heads=2, steps=3, lr=1e-3, warmup=1, out=out, **SMALL)
    run = minitv.train(resume=out, steps=5)
    assert run.step == 5 and run.experiment.run.lr == 1e-3 and run.experiment.variant.name == "retnet"
    with pytest.raises(UserError, match=r"--resume .*: --lr is 0.001 in this run and cannot become 0.002 \(arguments\)"):
        minitv.train(resume=out, steps=7, lr=2e-3)
    with pytest.raises(UserError, match="this is a run of retnet, it cannot continue as rwkv"):
        minitv.train("rwkv", resume=out, steps=7)


def test_patience_and_the_best_step_go_on_in_a_resumed_run(data, tmp_path, capsys):
    options = SMALL | dict(data=str(data), steps=50, eval_every=1, patience=3, lr=1.0, warmup=0, sample_tokens=0)
    whole = minitv.train("rwkv", out=str(tmp_path / "whole"), **options)
    assert 3 < whole.step < 50
    part = str(tmp_path / "part")
    stopped = minitv.train("rwkv", out=part, on_step=lambda record: record["step"] < whole.step - 1, **options)
    assert stopped.step == whole.step - 1
    capsys.readouterr()
    assert minitv.train(resume=part, data=str(data)).step == whole.step
    assert f"the held-out loss was lowest at step {whole.step - 3} (" in capsys.readouterr().err


def test_a_text_is_read_with_the_tokenizer_of_the_model(data, tmp_path):
    first = str(tmp_path / "first")
    minitv.train("rwkv", data=str(data), val_data=str(data), steps=1, out=first, **SMALL)
    with pytest.raises(UserError, match="--tokenizer byte: the model knows tokens of the kind char"):
        minitv.train(init_from=first, data=str(data), tokenizer="byte", out=str(tmp_path / "second"), steps=1)
    second = minitv.train(init_from=first, data=str(data), out=str(tmp_path / "second"), steps=1, sample_tokens=0)
    assert second.experiment.data.val_data is None  # the other run's text is not that of this one


def test_ctrl_c_saves_and_is_raised(data, tmp_path):
    def interrupt(record):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        minitv.train("rwkv", data=str(data), steps=9, out=str(tmp_path / "run"), on_step=interrupt, **SMALL)
    assert minitv.load(str(tmp_path / "run")).step == 1


def test_a_model_of_both_sides_does_not_write(data, tmp_path):
    options = {name: value for name, value in SMALL.items() if name != "sample_tokens"}
    run = minitv.train("encoder", data=str(data), heads=2, steps=1, out=str(tmp_path / "run"), **options)
    with pytest.raises(UserError, match="encoder sees a whole sequence at once, it cannot write"):
        run.write("the ")
    with pytest.raises(UserError, match="encoder sees a whole sequence at once, it cannot predict the next token"):
        run.loss(TEXT)


def test_options_of_reading_a_run_are_none_of_writing(data, tmp_path):
    run = minitv.train("rwkv", data=str(data), steps=1, out=str(tmp_path / "run"), **SMALL)
    with pytest.raises(UserError, match=r"write: count is an option of `minitv sample` alone"):
        run.write("the ", count=3)
