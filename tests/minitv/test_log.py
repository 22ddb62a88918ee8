"""log.jsonl: what is written is what is read, however a run ended."""

import json
import os

import numpy as np
import pytest

from minitv.errors import UserError
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
            with pytest.raises(OSError, match="crash"):
                Log(tmp_path, {}, resume_step=2)
        assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_fresh_log_replaces_and_a_missing_one_is_made(tmp_path):
    write_log(tmp_path, range(1, 4))
    write_log(tmp_path, [1])
    assert len(read_log(tmp_path)[1]) == 1
    write_log(tmp_path / "other", [5], resume_step=4)
    assert read_log(tmp_path / "other") == ({"variant": "transformer"}, [{"step": 5, "loss": 0.2}])


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "header"),
        (b'{"a": 1', "header"),
        (b"[1]\n", "line 1 is not"),
        (b"{}\nnonsense\n{}\n", "line 2 is not"),
        (b"\xff\n", "line 1"),
    ],
)
def test_a_broken_log_is_a_sentence(tmp_path, content, sentence):
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_log(tmp_path)


def test_no_log_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="a folder of a run is needed"):
        read_log(tmp_path / "nowhere")
