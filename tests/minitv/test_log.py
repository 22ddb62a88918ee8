"""log.jsonl: what is written is what is read, however a run ended."""

import json
import os
import re
import sys

import numpy as np
import pytest

from minitv.errors import CheckpointError, RunError, UserError
from minitv.log import Log, read_log


def write_log(directory, steps, **kwargs):
    with Log(directory, {"variant": "transformer"}, **kwargs) as log:
        for number in steps:
            log.write({"step": number, "loss": 1.0 / number})


def test_every_line_is_on_disk_at_once(tmp_path):
    log = Log(tmp_path / "new", {"variant": "v"})
    assert read_log(tmp_path / "new") == ({"variant": "v"}, [])
    log.write({"step": 1, "loss": 2.0})
    assert read_log(tmp_path / "new")[1] == [{"step": 1, "loss": 2.0}]
    log.close()


def test_nan_and_numpy_values_are_json(tmp_path):
    with Log(tmp_path, {"path": tmp_path, "list": (1, float("inf"))}) as log:
        log.write(
            {"step": np.int64(1), "loss": np.float32("nan"), "lr": float("-inf"), "array": np.array([1.0, np.nan])}
        )
    header, record = (tmp_path / "log.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(f"bare {name}")

    assert json.loads(header, parse_constant=refuse) == {"path": str(tmp_path), "list": [1, None]}
    assert json.loads(record, parse_constant=refuse) == {"step": 1, "loss": None, "lr": None, "array": [1.0, None]}


@pytest.mark.parametrize("torn", [b"", b'{"step": 7, "lo', b'{"step": 7}', b"\xff\x00"])
def test_resume_drops_later_records_and_a_torn_line(tmp_path, torn):
    write_log(tmp_path, range(1, 7))
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(torn)
    log = Log(tmp_path, {"variant": "another"}, resume_step=4)
    assert log.last == {"step": 4, "loss": 0.25}
    log.write({"step": 5, "loss": 0.0})
    log.close()
    header, records = read_log(tmp_path)
    assert header == {"variant": "transformer"}
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert records[-1]["loss"] == 0.0


def test_interrupted_and_resumed_is_the_same_file(tmp_path):
    write_log(tmp_path / "whole", range(1, 21))
    write_log(tmp_path / "parts", range(1, 13))
    write_log(tmp_path / "parts", range(11, 21), resume_step=10)
    assert (tmp_path / "whole/log.jsonl").read_bytes() == (tmp_path / "parts/log.jsonl").read_bytes()


def test_a_crash_while_resuming_keeps_the_old_log(tmp_path, monkeypatch):
    write_log(tmp_path, range(1, 7))
    before = (tmp_path / "log.jsonl").read_bytes()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *a: (_ for _ in ()).throw(OSError("crash")))
            with pytest.raises(RunError, match=r"log\.jsonl could not be written: crash"):
                Log(tmp_path, {}, resume_step=2)
        assert (tmp_path / "log.jsonl").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_disk_that_is_full_in_the_middle_of_a_line_is_a_sentence(tmp_path):
    import resource

    log = Log(tmp_path, {"variant": "v"})
    log.write({"step": 1, "loss": 1.0})
    before = read_log(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.jsonl").stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(RunError, match=r"log\.jsonl could not be written: File too large"):
            log.write({"step": 2, "loss": 1.0})
        with pytest.raises(RunError, match=r"log\.jsonl could not be written: File too large"):
            Log(tmp_path, {"variant": "v" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.close()
    assert read_log(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_fresh_log_replaces_and_a_missing_one_is_made(tmp_path):
    write_log(tmp_path, range(1, 4))
    write_log(tmp_path, [1])
    assert len(read_log(tmp_path)[1]) == 1
    write_log(tmp_path / "other", [5], resume_step=4)
    assert read_log(tmp_path / "other") == ({"variant": "transformer"}, [{"step": 5, "loss": 0.2}])


HEADER = b'{"variant": "v"}\n'
DAMAGES = [
    (b"", "the header line is missing"),
    (b'{"a": 1', "the header line is missing"),
    (b"[1]\n", "line 1 is not a JSON object"),
    (b"\xff\n", "line 1 is not a JSON object"),
    (b"{}\nnonsense\n{}\n", "line 2 is not a JSON object"),
    (b"[" * 200_000 + b"\n", "line 1 is not a JSON object"),
    (b'{"parameters": "many"}\n', "line 1: parameters: 'many' is not an integer from 0 up"),
    (b'{"ngram_bpc": [1, null]}\n', r"line 1: ngram_bpc\[1\]: None is not a finite number"),
    (b'{"ngram_bpc": 3}\n', "line 1: ngram_bpc: 3 is not a list"),
    (b'{"tokens_per_char": [1]}\n', r"line 1: tokens_per_char: \[1\] is not a JSON object"),
    (b'{"tokens_per_char": {"training": "1"}}\n', "line 1: tokens_per_char: training: '1' is not a finite number"),
    (b'{"variant": 3}\n', "line 1: variant: 3 is not a text or null"),
    (HEADER + b'{"loss": 1}\n', "line 2: step is missing"),
    (HEADER + b'{"step": "3"}\n', "line 2: step: '3' is not an integer from 0 up"),
    (HEADER + b'{"step": -1}\n', "line 2: step: -1 is not an integer from 0 up"),
    (HEADER + b'{"step": 1.5}\n', "line 2: step: 1.5 is not an integer"),
    (HEADER + b'{"step": true}\n', "line 2: step: True is not an integer"),
    (HEADER + b'{"step": 1, "loss": "a"}\n', "line 2: loss: 'a' is not a finite number or null"),
    (HEADER + b'{"step": 1, "val_loss": NaN}\n', "line 2 is not a JSON object"),
    (HEADER + b'{"step": 1, "val_loss": 1e999}\n', "line 2: val_loss: inf is not a finite number"),
    (HEADER + b'{"step": 1, "bpc": 1' + b"0" * 400 + b"}\n", "line 2: bpc: 1000.* is not a finite number"),
    (HEADER + b'{"step": 1, "\\u001b[31m": []}\n', r"line 2: \\x1b\[31m: \[\] is not a finite number"),
]


@pytest.mark.parametrize("content, sentence", DAMAGES)
def test_a_damaged_log_is_a_sentence(tmp_path, content, sentence):
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"log\.jsonl: {sentence}") as error:
        read_log(tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("content, sentence", DAMAGES)
def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path, content, sentence):
    whole = content + b'{"step": 4, "loss": 2.0}\n{"step": 9, "loss": 1.0}\n' * content.startswith(HEADER)
    (tmp_path / "log.jsonl").write_bytes(whole)
    with Log(tmp_path, {"variant": "v"}, resume_step=5) as log:
        assert re.search(sentence, log.note) and "left out; the file as it was is" in log.note
        log.write({"step": 6, "loss": 1.5})
    assert (tmp_path / "log.damaged.jsonl").read_bytes() == whole
    header, records = read_log(tmp_path)
    assert header.get("variant") == ("v" if content[:2] != b"{}" else None)
    assert [record["step"] for record in records] == [*([4] if content.startswith(HEADER) else []), 6]


def test_a_sound_log_is_kept_without_a_note(tmp_path):
    write_log(tmp_path, range(1, 4))
    with Log(tmp_path, {}, resume_step=3) as log:
        assert log.note == ""
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
@pytest.mark.parametrize("make, kind", [(os.mkfifo, "pipe"), (lambda path: path.symlink_to("/dev/zero"), "device")])
def test_a_log_that_has_no_end_is_not_read(tmp_path, make, kind):
    make(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match=f"this is a {kind}, and a file is needed"):
        read_log(tmp_path)


def test_no_log_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="a folder of a run is needed"):
        read_log(tmp_path / "nowhere")
