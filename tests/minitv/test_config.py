"""Options from dataclasses: types, ranges, layers, files, sentences."""

import contextlib
import io
import json
import math
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from minitv import cli, tasks, variants
from minitv.config import Options, Parser, check, choose, encode, from_json, option, read_toml, settings, table, to_json
from minitv.errors import UserError
from minitv.options import PRESETS, SYNONYMS, ModelOptions, SampleOptions, TrainOptions
from minitv.tasks.text import TextOptions
from minitv.variants.hyena import HyenaOptions

RUNS = Path("runs")


@dataclass(frozen=True)
class Demo:
    """demo options."""

    layers: int = option(2, "blocks, 100 % ours", low=1, high=8)
    learning_rate: float = option(1e-3, "of the optimizer", above=0, below=1)
    name: str = option("x", "a name")
    mode: str = option("char", "how", choices=("char", "byte"))
    fast: bool = option(True, "quick")
    threads: int | None = option(None, "workers", low=1)
    folder: Path = option(RUNS, "where")  # noqa: RUF009 - a field

    __post_init__ = check


def parse(*argv, synonyms=None):
    parser = Parser("demo", usage="demo [options]", synonyms=synonyms)
    parser.add_options(Options(Demo))
    return parser.parse(argv)


def refused(*argv, **kwargs):
    with pytest.raises(UserError) as error:
        parse(*argv, **kwargs)
    return str(error.value)


@pytest.mark.parametrize(
    "argv, expected",
    [
        ((), {}),
        (("--layers", "3"), {"layers": 3}),
        (("--learning-rate", "0.5"), {"learning_rate": 0.5}),
        (("--learning_rate=0.5",), {"learning_rate": 0.5}),
        (("--learning-rate", "1e-4"), {"learning_rate": 1e-4}),
        (("--no-fast",), {"fast": False}),
        (("--no-fast", "--fast"), {"fast": True}),
        (("--threads", "none"), {"threads": None}),
        (("--threads", "4"), {"threads": 4}),
        (("--name", "none"), {"name": "none"}),
        (("--name=--a_b",), {"name": "--a_b"}),
        (("--name", "a_b=c_d"), {"name": "a_b=c_d"}),
        (("--name", "-"), {"name": "-"}),
        (("--folder", "a/b"), {"folder": Path("a/b")}),
        (("--layers", "3", "--layers", "4"), {"layers": 4}),
    ],
)
def test_only_what_was_given_is_returned_with_its_type(argv, expected):
    given = parse(*argv)
    assert given == expected
    assert [type(v) for v in given.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (("--layers", "0"), "--layers: 0 is too small, allowed: an integer from 1 up to 8"),
        (("--layers", "9"), "--layers: 9 is too large, allowed: an integer from 1 up to 8"),
        (("--layers", "2.0"), "--layers: '2.0' is not an integer, allowed: an integer from 1 up to 8"),
        (("--learning-rate", "0"), "--learning-rate: 0.0 is too small, allowed: a number above 0 and below 1"),
        (("--learning-rate", "1"), "--learning-rate: 1.0 is too large, allowed: a number above 0 and below 1"),
        (
            ("--learning-rate", "nan"),
            "--learning-rate: nan is not a finite number, allowed: a number above 0 and below 1",
        ),
        (
            ("--learning-rate", "inf"),
            "--learning-rate: inf is not a finite number, allowed: a number above 0 and below 1",
        ),
        (("--learning-rate", "fast"), "--learning-rate: 'fast' is not a number, allowed: a number above 0 and below 1"),
        (("--threads", "0"), "--threads: 0 is too small, allowed: an integer from 1 or none"),
        (("--mode", "bytes"), "--mode: 'bytes' is unknown, allowed: char, byte; did you mean byte?"),
        (("--layrs", "3"), "unknown option --layrs; did you mean --layers?"),
        (("--layrs=3",), "unknown option --layrs; did you mean --layers?"),
        (("--no-fsat",), "unknown option --no-fsat; did you mean --no-fast?"),
        (("--lay", "3"), "unknown option --lay; did you mean --layers?"),
        (("--zzz",), "unknown option --zzz, see demo --help"),
        (("-q",), "unknown option -q, see demo --help"),
        (("--layers",), "--layers: a value is missing"),
        (("--layers", "--fast"), "--layers: a value is missing"),
        (("--fast=false",), "--fast takes no value: write --fast or --no-fast"),
        (("--fast", "False"), "--fast takes no value: write --fast or --no-fast"),
        (("--no-fast", "true"), "--no-fast takes no value: write --fast or --no-fast"),
        (("--name", "-x"), "--name: a value is missing; if it begins with - write --name=-..."),
        (("stray",), "'stray' is out of place, usage: demo [options]"),
    ],
)
def test_mistakes_become_sentences(argv, sentence):
    assert refused(*argv) == sentence


def test_names_of_other_programs_are_suggested():
    assert refused("--n_layer=4", synonyms={"n_layer": "layers"}) == "unknown option --n-layer; here it is --layers"


def test_a_name_of_another_program_without_an_option_here_is_not_suggested():
    assert refused("--n_head=4", synonyms={"n_head": "heads"}) == "unknown option --n-head, see demo --help"


def test_help_has_every_option_with_default_and_range(capsys):
    parser = Parser("demo", usage="demo [options]")
    parser.add_options(Options(Demo), {"layers": 5})
    text = " ".join(parser.format_help().split())
    assert "demo options:" in text
    assert "--layers N blocks, 100 % ours (an integer from 1 up to 8; default: 5)" in text
    assert "(a number above 0 and below 1; default: 0.001)" in text
    assert "--mode {char,byte} how (default: char)" in text
    assert "--fast, --no-fast quick (default: on)" in text
    assert "--threads N workers (an integer from 1 or none; default: none)" in text
    assert "learning_rate" not in text


def test_the_later_layer_wins_and_its_source_is_kept():
    values, sources = Options(Demo).merge(
        ("preset a", {"layers": 3, "mode": "byte"}),
        ("f.toml", {"layers": 4, "threads": 2}),
        ("command line", {"layers": 5}),
    )
    assert (values["layers"], values["mode"], values["threads"], values["name"]) == (5, "byte", 2, "x")
    assert (sources["layers"], sources["mode"]) == ("command line", "preset a")
    assert (sources["threads"], sources["name"]) == ("f.toml", "default")


@pytest.mark.parametrize(
    "layer, sentence",
    [
        ({"layrs": 1}, "f.toml: unknown option 'layrs'; did you mean layers?"),
        ({"layers": "3"}, "f.toml: layers: '3' is not an integer"),
        ({"layers": True}, "f.toml: layers: True is not an integer"),
        ({"layers": 3.0}, "f.toml: layers: 3.0 is not an integer"),
        ({"fast": 1}, "f.toml: fast: 1 is not true or false"),
        ({"learning_rate": math.nan}, "f.toml: learning_rate: nan is not a finite number"),
        ({"learning_rate": 10**400}, "f.toml: learning_rate: inf is not a finite number"),
        ({"name": None}, "f.toml: name: a value is needed"),
    ],
)
def test_layers_are_checked_and_the_source_is_named(layer, sentence):
    with pytest.raises(UserError) as error:
        Options(Demo).merge(("f.toml", layer))
    assert str(error.value).startswith(sentence)


def test_a_field_declared_twice_is_a_programming_error():
    @dataclass(frozen=True)
    class Other:
        layers: int = option(1, "again")

    with pytest.raises(TypeError, match="'layers' of Other is declared twice"):
        Options(Demo, Other)


@pytest.mark.parametrize("annotation, default", [(list, None), (int | str, 1), (bool | None, None)])
def test_a_type_without_an_option_is_a_programming_error(annotation, default):
    cls = dataclass(frozen=True)(type("Bad", (), {"__annotations__": {"x": annotation}, "x": option(default, "what")}))
    with pytest.raises(TypeError, match=r"Bad\.x"):
        settings(cls)


def test_a_dataclass_checks_itself_and_turns_integers_into_floats():
    @dataclass(frozen=True)
    class Rate:
        rate: float = option(0.5, "rate", low=0)
        __post_init__ = check

    assert type(Rate(rate=1).rate) is float
    with pytest.raises(UserError, match="layers: 0 is too small"):
        Demo(layers=0)


def test_json_round_trip():
    config = Demo(layers=3, threads=4, folder=Path("a") / "b")
    assert from_json(Demo, json.loads(json.dumps(to_json(config)))) == config
    assert from_json(Demo, to_json(Demo())) == Demo()


def test_an_option_that_is_retired_is_left_out_of_what_an_older_run_saved():
    data = {**to_json(HyenaOptions()), "online_block": 16}
    assert from_json(HyenaOptions, data) == HyenaOptions()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda d: d.update(layrs=1), "Demo: unknown field 'layrs'; did you mean layers?"),
        (lambda d: d.pop("layers"), "Demo: missing field 'layers'"),
        (lambda d: (d.pop("layers"), d.pop("name")), "Demo: missing fields 'layers', 'name'"),
        (lambda d: d.update(layers=0), "Demo.layers: 0 is too small"),
        (lambda d: d.update(layers=None), "Demo.layers: a value is needed"),
    ],
)
def test_stored_json_is_checked(change, sentence):
    data = to_json(Demo())
    change(data)
    for where in ("Demo", "run/last/state.json: model"):
        with pytest.raises(UserError) as error:
            from_json(Demo, data, where)
        assert str(error.value).startswith(sentence.replace("Demo", where))


def test_an_error_of_the_class_itself_says_where_too():
    data = {**to_json(TrainOptions()), "lr": 0.01, "min_lr": 0.1}
    with pytest.raises(UserError, match=r"^state\.json: run: --min-lr: 0\.1 is above --lr"):
        from_json(TrainOptions, data, "state.json: run")


@pytest.mark.parametrize("data", [[], "text", None, 3])
def test_stored_json_that_is_no_object(data):
    with pytest.raises(UserError, match="expected an object"):
        from_json(Demo, data)


@pytest.mark.parametrize("cls, name", [(TrainOptions, "out"), (TextOptions, "data"), (SampleOptions, "out")])
def test_a_tilde_is_the_home_also_where_no_shell_reads_it(cls, name, monkeypatch):
    setting = settings(cls)[name]
    monkeypatch.setattr(os.path, "expanduser", lambda path: "/home/me")
    for path, expected in {"~": "/home/me", "~/run": "/home/me/run", "~run": "~run", "run/~": "run/~"}.items():
        assert setting.check(path, "c.toml: out") == setting.parse(path) == getattr(cls(**{name: path}), name) == expected
    assert settings(SampleOptions)["prompt"].parse("~/run") == "~/run"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match=r"c\.toml: out: '~/run' begins with the folder of the user, who has none"):
        setting.check("~/run", "c.toml: out")


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"layers = ", "not a TOML file"),
        (b"\xff\xfe", "not a TOML file"),
        (b"[model]\nlayers = 1", "tables are not used"),
        (b"eval-every = 1\neval_every = 2", "eval_every is given twice"),
    ],
)
def test_toml_mistakes(tmp_path, content, sentence):
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_toml(tmp_path / "c.toml")


def test_a_key_of_many_levels_costs_no_time(tmp_path):
    deep = ".a" * 100_000
    for content in (f"a{deep} = 1", f"[a{deep}]\nb = 1", f"layers = 2\n 'b'{deep} = 1"):
        (tmp_path / "c.toml").write_text(content)
        start = time.process_time()
        with pytest.raises(UserError, match=r"line \d has a key of more than 100 dots; options have none"):
            read_toml(tmp_path / "c.toml")
        assert time.process_time() - start < 1  # tomllib takes 20 s
    (tmp_path / "c.toml").write_text("# " + "." * 200 + f'\nname = "{"." * 200}"')
    assert read_toml(tmp_path / "c.toml") == {"name": "." * 200}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_a_pipe_is_read_with_a_line_that_says_so_and_a_device_is_not(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("layers = 3\n"))
    writer.start()
    assert read_toml(tmp_path / "pipe") == {"layers": 3}
    writer.join()
    assert capsys.readouterr().err == f"reading {tmp_path / 'pipe'}, a pipe, up to its end\n"
    with pytest.raises(UserError, match="--config /dev/zero: this is a device, and a file is needed"):
        read_toml("/dev/zero")
    with pytest.raises(UserError, match="Is a directory"):
        read_toml(tmp_path)


LONG = "x" * 100_000


@pytest.mark.parametrize("call", [
    lambda path: parse("--layers", LONG),
    lambda path: parse("--mode", LONG),
    lambda path: parse("--mode", "\x1b[31mred\n"),
    lambda path: parse("--" + LONG),
    lambda path: parse("--\x1b[31m"),
    lambda path: parse(LONG),
    lambda path: parse("--fast=" + LONG),
    lambda path: parse("-" + LONG),
    lambda path: Options(Demo).merge((LONG, {"layers": 0})),
    lambda path: Options(Demo).merge(("f.toml", {LONG: 0})),
    lambda path: Options(Demo).merge(("f.toml", {"\n\x1b": 0})),
    lambda path: Options(Demo).merge(("f.toml", {"layers": int("f" * 10_000, 16)})),
    lambda path: Options(Demo).merge(("f.toml", {"layers": [LONG] * 3})),
    lambda path: Options(Demo).merge(("f.toml", {"name": "\ud800"})),
    lambda path: from_json(Demo, LONG),
    lambda path: from_json(Demo, {**to_json(Demo()), LONG: 1}),
    lambda path: from_json(Demo, {**to_json(Demo()), "mode": "\x1b[31m\n"}),
    lambda path: from_json(Demo, {**to_json(Demo()), "layers": LONG}),
    lambda path: choose("variant", LONG, ["a"]),
    lambda path: choose("variant", "\x1b[31m\n", ["a"]),
    lambda path: read_toml(LONG[:200] + "\x1b[31m\n"),
    lambda path: read_toml(written(path, f"[{LONG}]")),
    lambda path: read_toml(written(path, f"{LONG} = 1\n{LONG} = 2")),
    lambda path: read_toml(written(path, '"\\u001b\\n-" = 1\n"\\u001b\\n_" = 2')),
    lambda path: read_toml(written(path, "\x1b[31m" + LONG)),
])
def test_what_a_message_repeats_is_short_and_no_terminal_obeys_it(tmp_path, call):
    with pytest.raises(UserError) as error:
        call(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 2100


def written(folder, text):
    (folder / "c.toml").write_text(text)
    return folder / "c.toml"


def test_file_names_that_are_not_utf_8_come_back_from_a_file(tmp_path):
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    (tmp_path / "c.toml").write_bytes(encode(table([("group", "data", name, "default"), ("group", "a", "é", "x")])))
    assert read_toml(tmp_path / "c.toml") == {"data": name, "a": "é"}


def test_toml_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_toml(tmp_path / "c.toml")


def test_the_printed_table_is_a_toml_file_of_the_same_values(tmp_path):
    values = {"a": 1, "b": 1e-05, "c": True, "d": None, "e": 'qu"o\\te\n\x7f é', "f": 0.1, "g": 1e22, "h": 2**63 - 1}
    text = table([("group", name, value, "default") for name, value in values.items()])
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    assert read_toml(tmp_path / "c.toml") == values | {"d": "none"}


# -- the options of minitv itself --------------------------------------------------------------------------------------


def test_every_option_has_a_valid_default():
    every = ModelOptions(), TrainOptions(), TextOptions()
    SampleOptions()
    Options(*map(type, every)).merge(*(("defaults", to_json(options)) for options in every))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_legal_and_complete(name):
    known = settings(ModelOptions) | settings(TrainOptions)
    preset = {key: value for key, value in PRESETS[name].items() if key != "heads"}  # heads: the mixer's
    for key, value in preset.items():
        known[key].check(value, key)
    if preset:
        assert preset.keys() == PRESETS["small"].keys() - {"heads"}  # no preset depends on what another one tunes


def test_published_setting_of_nanogpt_cpu():
    expected = dict(
        context=64,
        batch=12,
        layers=4,
        heads=4,
        width=128,
        dropout=0.0,
        bias=False,
        tied=True,
        beta1=0.9,
        beta2=0.99,
        weight_decay=0.1,
        clip=1.0,
        lr=1e-3,
        warmup=100,
        steps=2000,
    )
    assert PRESETS["nanogpt-cpu"] == expected


def test_names_in_tables_exist():
    known = {name for options in (ModelOptions, TrainOptions, TextOptions, SampleOptions) for name in settings(options)}
    known.add("heads")
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known


def test_the_lowest_learning_rate_follows_the_highest():
    assert TrainOptions(lr=3e-3).min_lr == 3e-4
    assert TrainOptions(lr=1e-3, min_lr=0.0).min_lr == 0
    with pytest.raises(UserError, match=r"min-lr: 0\.1 is above --lr"):
        TrainOptions(lr=0.01, min_lr=0.1)


def test_an_option_of_several_variants_stands_with_every_meaning():
    text = run_help(["compare", "--help"])
    heading, rest = "options with a meaning for each variant", text.split("options with a meaning for each variant")[1]
    assert text.count(heading) == 1 and text.count("--heads") == 1
    shown = " ".join(rest.split("--heads")[1].split("\n  --")[0].split())
    assert "transformer: attention heads" in shown and "retnet: retention heads" in shown and "aft-conv: groups" in shown


def test_help_texts_are_phrases_of_their_own():
    classes = [ModelOptions, TrainOptions, SampleOptions, *(entry.load().options for entry in variants.variants().values()),
               *(entry.load().Options for entry in tasks.tasks().values())]
    for cls in classes:
        for name, setting in settings(cls).items():
            assert not setting.help.startswith(("of ", "the same of", "its ")), (cls.__name__, name, setting.help)


def run_help(argv):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(argv) == 0
    return out.getvalue()
