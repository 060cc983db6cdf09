"""tools/make_shards.py, tools/check_shards.py and tools/merge_shards.py as a user runs them."""

import csv
import hashlib
import importlib.util
import json
import tracemalloc
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from sample_factory import mixed, png

from infimed.data.index import MERGED, index_path
from infimed.data.shards import open_shards, reindex, write_shards
from infimed.processing.tokenizer import Tokenizer, train_tokenizer

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(tmp_path, tokenizer_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(png(1))
    (tmp_path / "images" / "a" / "two").write_bytes(png(2))
    (tmp_path / "secret.png").write_bytes(png(2))

    def run(text: str | None, *more: str, name: str = "in.jsonl") -> int:
        if text is not None:
            (tmp_path / name).write_text(text)
        args = [tmp_path / name, "--images", tmp_path / "images", "--out", tmp_path / "out", "--tokenizer", tokenizer_path, *more]
        return load("make_shards").main([str(arg) for arg in args])

    return run


MESSAGES = {"messages": [{"role": "user", "text": "<image>which?"}, {"role": "assistant", "text": "axial"}], "images": ["a/1.png"]}
LLAVA = {"id": "x/7.b", "image": "a/1.png", "conversations": [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}]}


# --- making ----------------------------------------------------------------------------------------------------------


def test_messages_and_llava_records_become_sound_shards(make, tmp_path, capsys):
    assert make(json.dumps([{**MESSAGES, "task": "plane"}, {**LLAVA, "model": "m"}]), "--licence", "CC0-1.0", "--source", "mine") == 0
    shards = open_shards([tmp_path / "out"])
    assert [(row.key, row.source, row.task) for row in shards.rows] == [("00000000", "mine", "plane"), ("x_7_b", "mine", "unknown")]
    sample, images = shards.read(1)
    assert (sample.messages[1].role, sample.licence, images) == ("assistant", "CC0-1.0", (png(1),))
    assert load("check_shards").main([str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "1 shards sound" in out and "fields that were not read: model (1)" in out


def test_a_table_becomes_shards(make, tmp_path):
    with (tmp_path / "t.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer", "image", "conversations", "organ"])
        rows.writerow(["Which, and why?", "axial", "a/1.png;a/two", "", "brain"])
        rows.writerow(["", "", "a/1.png", json.dumps(LLAVA["conversations"]), ""])
    assert make(None, "--licence", "CC0-1.0", name="t.csv") == 0
    (first, images), (second, _) = open_shards([tmp_path / "out"]).read_many([0, 1])
    assert (first.messages[0].text, first.organ, first.source) == ("<image><image>\nWhich, and why?", "brain", "t")
    assert (first.images, images) == (("0.png", "1.png"), (png(1), png(2)))
    assert (second.messages[0].text, second.organ) == ("<image>\nhi", "unknown")


def test_parquet_with_the_bytes_of_its_images_becomes_shards(make, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [
        {"caption": "a head", "image": {"bytes": png(5), "path": None}, "organ": None},
        {"caption": "an arm", "image": {"bytes": None, "path": "a/1.png"}, "organ": "arm"},
    ]
    __import__("pyarrow.parquet").parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert make(None, "--licence", "CC0-1.0", "--prompt", "Say it.", name="t.parquet") == 0
    found = open_shards([tmp_path / "out"]).read_many([0, 1])
    assert [(sample.messages[0].text, sample.images, images) for sample, images in found] == [
        ("<image>\nSay it.", ("0.png",), (png(5),)),
        ("<image>\nSay it.", ("0.png",), (png(1),)),
    ]
    assert [sample.organ for sample, _ in found] == ["unknown", "arm"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(MESSAGES), "no licence"),
        (json.dumps({**MESSAGES, "licence": "X", "images": ["../secret.png"]}), "no file inside"),
        (json.dumps({**MESSAGES, "licence": "X", "images": []}), "image_mismatch"),
        (json.dumps({"licence": "X"}), "neither messages nor conversations"),
        ("{}\n{oops", "line 3 is not JSON"),
        ("", "no record to write"),
    ],
)
def test_a_bad_record_stops_the_tool_with_one_clear_message_and_leaves_nothing(make, tmp_path, capsys, text, said):
    assert make(f"{json.dumps({**LLAVA, 'licence': 'X'})}\n{text}" if text else "", "--max-samples", "1") == 2
    assert said in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_records_can_be_left_out_and_are_counted(make, tmp_path, capsys):
    assert make(f"{json.dumps(LLAVA)}\n{{}}\n", "--licence", "CC0-1.0", "--skip-bad") == 1
    assert "1 samples in 1 shards" in capsys.readouterr().out
    assert len(open_shards([tmp_path / "out"])) == 1


def test_making_shards_holds_one_sample_at_a_time(make, tmp_path):
    picture = png(1) + bytes(2**20)  # decodes, and is a megabyte long
    (tmp_path / "images" / "big.png").write_bytes(picture)
    lines = [json.dumps({**LLAVA, "id": n, "image": "big.png"}) for n in range(40)]
    make(json.dumps(LLAVA), "--licence", "CC0-1.0", "--prefix", "warm")
    tracemalloc.start()
    assert make("\n".join(lines), "--licence", "CC0-1.0") == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2**20  # 2.2 MiB measured; all forty are 40 MiB


def test_a_dicom_file_needs_a_record_that_its_patients_identity_was_removed(make, tmp_path, capsys):
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    record = json.dumps({**MESSAGES, "images": ["ct.dcm"]})
    dataset.save_as(tmp_path / "images" / "ct.dcm")
    assert make(record, "--licence", "CC0-1.0") == 2
    assert "not_deidentified" in capsys.readouterr().err
    dataset.PatientIdentityRemoved = "YES"
    dataset.save_as(tmp_path / "images" / "ct.dcm")
    assert make(record, "--licence", "CC0-1.0") == 0


# --- checking --------------------------------------------------------------------------------------------------------


def test_the_checker_names_each_problem_and_reindexing_mends_a_lost_index(make, tmp_path, capsys):
    make(json.dumps(LLAVA), "--licence", "CC0-1.0")
    (tar,) = (tmp_path / "out").glob("*.tar")
    index_path(tar).unlink()
    check = load("check_shards").main
    assert check([str(tar)]) == 1
    assert "no index beside it" in capsys.readouterr().out
    assert check([str(tar), "--reindex"]) == 0
    assert check([str(tar)]) == 0
    tar.write_bytes(tar.read_bytes()[:1500])
    assert check([str(tar)]) == 1
    assert "ends early" in capsys.readouterr().out


def test_a_missing_path_is_a_mistake_of_the_user(tmp_path, capsys):
    assert load("check_shards").main([str(tmp_path / "nowhere.tar")]) == 2
    assert "nowhere.tar: no such .tar" in capsys.readouterr().err


def test_a_tar_made_elsewhere_is_indexed_with_what_it_does_not_say(tmp_path, tokenizer_path, capsys):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        sink.write({"__key__": "x", "png": png(1), "txt": "a head"})
    check = load("check_shards").main
    assert check([str(tmp_path), "--reindex"]) == 1
    assert "no_licence" in capsys.readouterr().out
    options = ["--licence", "MIT", "--source", "web", "--prompt", "Say it.", "--tokenizer", str(tokenizer_path)]
    assert check([str(tmp_path), "--reindex", *options]) == 0
    assert check([str(tmp_path)]) == 0
    sample, _ = open_shards([tmp_path]).read(0)
    assert (sample.source, sample.licence, sample.messages[0].text) == ("web", "MIT", "<image>\nSay it.")


# --- merging ---------------------------------------------------------------------------------------------------------


def merge(*args: object) -> int:
    return load("merge_shards").main([str(arg) for arg in args])


def test_many_shards_become_few_that_hold_the_same_samples(tmp_path, shards_path, tokenizer):
    write_shards(mixed(90)[60:], tmp_path / "more", max_samples=7, tokenizer=tokenizer)
    for name in ("one", "two"):
        assert merge(shards_path, tmp_path / "more", "--out", tmp_path / name, "--max-samples", 50) == 0
    merged = open_shards([tmp_path / "one"])
    assert [shard.tar.rows for shard in merged.shards] == [50, 40]
    assert merged.read_many(range(90)) == [(sample, tuple(images)) for sample, images in mixed(90)]
    assert load("check_shards").main([str(tmp_path / "one")]) == 0
    digests = [[hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / name).iterdir())] for name in ("one", "two")]
    assert digests[0] == digests[1]
    write_shards(mixed(90), tmp_path / "direct", max_samples=50, tokenizer=tokenizer)
    assert digests[0] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / "direct").iterdir())]


def test_keys_that_come_twice_are_refused_before_anything_is_written_unless_the_folder_tells_them_apart(tmp_path, tokenizer, capsys):
    for name in ("a", "b c"):
        write_shards(mixed(4), tmp_path / name, tokenizer=tokenizer)
    assert merge(tmp_path / "a", tmp_path / "b c", "--out", tmp_path / "out") == 2
    assert "key 's00000' comes twice" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert merge(tmp_path / "a", tmp_path / "b c", "--out", tmp_path / "out", "--prefix-keys") == 0
    assert [row.key for row in open_shards([tmp_path / "out"]).rows][3:5] == ["a/s00003", "b_c/s00000"]


def test_merging_copies_no_damaged_byte_and_mixes_no_tokenizers(tmp_path, tokenizer, capsys):
    (tar,) = write_shards(mixed(4), tmp_path / "a", tokenizer=tokenizer)
    train_tokenizer(["nothing alike"], vocab_size=300).save(str(tmp_path / "tokenizer.json"))
    write_shards(mixed(9)[4:], tmp_path / "b", tokenizer=Tokenizer.load(tmp_path / "tokenizer.json"))
    assert merge(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out") == 2
    assert "different tokenizers" in capsys.readouterr().err
    place = open_shards([tar]).rows[3].members[0].offset
    data = bytearray(tar.read_bytes())
    data[place] ^= 1
    tar.write_bytes(data)
    assert merge(tmp_path / "a", "--out", tmp_path / "out", "--max-samples", 1) == 2
    assert "checksum: s00003.json" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_samples_of_foreign_tars_are_merged_with_what_their_index_says_of_them(tmp_path, shards_path, tokenizer):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        sink.write({"__key__": "ü" * 80, "png": png(1), "txt": "a head", "cls": "3"})
    reindex(tmp_path / "a.tar", tokenizer=tokenizer, defaults={"source": "web", "licence": "MIT"})
    assert merge(shards_path, tmp_path / "a.tar", "--out", tmp_path / "out") == 0
    merged = open_shards([tmp_path / "out"])
    assert merged.read(60) == open_shards([tmp_path / "a.tar"]).read(0)
    assert load("check_shards").main([str(tmp_path / "out")]) == 0


def test_the_merged_index_of_merged_shards_is_written_and_used(tmp_path, shards_path, capsys):
    assert merge(shards_path, "--out", tmp_path / "out", "--max-samples", 25) == 0
    assert merge("--index-only", tmp_path / "out") == 0
    assert {Path(shard.header.path).name for shard in open_shards([tmp_path / "out"]).shards} == {MERGED}
    assert merge(tmp_path / "out", "--out", tmp_path / "again", "--max-samples", 100) == 0
    assert len(open_shards([tmp_path / "again"])) == 60
    assert merge("--index-only", tmp_path / "nowhere") == 2
    assert "no folder that holds any .tar" in capsys.readouterr().err
