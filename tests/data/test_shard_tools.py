"""tools/make_shards.py and tools/check_shards.py as a user runs them."""

import importlib.util
import json
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from sample_factory import png

from infimed.data.index import index_path
from infimed.data.shards import open_shards

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(tmp_path, tokenizer_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))

    def run(text: str, *more: str) -> int:
        (tmp_path / "in.jsonl").write_text(text)
        args = [tmp_path / "in.jsonl", "--images", tmp_path / "images", "--out", tmp_path / "out", "--tokenizer", tokenizer_path, *more]
        return load("make_shards").main([str(arg) for arg in args])

    return run


MESSAGES = {"messages": [{"role": "user", "text": "<image>which?"}, {"role": "assistant", "text": "axial"}], "images": ["a/1.png"]}
LLAVA = {"id": "x/7.b", "image": "a/1.png", "conversations": [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}]}


def test_messages_and_llava_records_become_sound_shards(make, tmp_path, capsys):
    assert make(json.dumps([{**MESSAGES, "task": "plane"}, LLAVA]), "--licence", "CC0-1.0", "--source", "mine") == 0
    shards = open_shards([tmp_path / "out"])
    assert [(row.key, row.source, row.task) for row in shards.rows] == [("00000000", "mine", "plane"), ("x_7_b", "mine", "unknown")]
    sample, images = shards.read(1)
    assert (sample.messages[1].role, sample.licence, images) == ("assistant", "CC0-1.0", (png(1),))
    assert load("check_shards").main([str(tmp_path / "out")]) == 0
    assert "1 shards sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(MESSAGES), "no licence"),
        (json.dumps({**MESSAGES, "licence": "X", "images": ["../secret.png"]}), "no file inside"),
        (json.dumps({**MESSAGES, "licence": "X", "images": []}), "image_mismatch"),
        (json.dumps({"licence": "X"}), "neither messages nor conversations"),
        ("{}\n{oops", "line 2 is not JSON"),
    ],
)
def test_a_bad_record_stops_the_tool_with_one_clear_message(make, capsys, text, said):
    assert make(text) == 2
    assert said in capsys.readouterr().err


def test_bad_records_can_be_left_out_and_are_counted(make, tmp_path, capsys):
    assert make(f"{json.dumps(LLAVA)}\n{{}}\n", "--licence", "CC0-1.0", "--skip-bad") == 1
    assert "1 samples in 1 shards" in capsys.readouterr().out
    assert len(open_shards([tmp_path / "out"])) == 1


def test_a_dicom_file_needs_a_record_that_its_patients_identity_was_removed(make, tmp_path, capsys):
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    record = json.dumps({**MESSAGES, "images": ["ct.dcm"]})
    dataset.save_as(tmp_path / "images" / "ct.dcm")
    assert make(record, "--licence", "CC0-1.0") == 2
    assert "not_deidentified" in capsys.readouterr().err
    dataset.PatientIdentityRemoved = "YES"
    dataset.save_as(tmp_path / "images" / "ct.dcm")
    assert make(record, "--licence", "CC0-1.0") == 0


def test_the_checker_names_each_problem_and_reindexing_mends_a_lost_index(make, tmp_path, capsys):
    make(json.dumps(LLAVA), "--licence", "CC0-1.0")
    (tar,) = (tmp_path / "out").glob("*.tar")
    index_path(tar).unlink()
    check = load("check_shards").main
    assert check([str(tar), str(tmp_path / "nowhere.tar")]) == 1
    out = capsys.readouterr().out.splitlines()
    assert any("nowhere.tar" in line for line in out)
    assert any("no index beside it" in line for line in out)
    assert check([str(tar), "--reindex"]) == 0
    assert check([str(tar)]) == 0
    tar.write_bytes(tar.read_bytes()[:1500])
    assert check([str(tar)]) == 1
    assert "ends early" in capsys.readouterr().out
