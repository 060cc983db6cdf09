"""Inputs that are broken, odd or hostile end as faults or as errors that say what to do, never as a trace, a hang or a leak."""

import importlib.util
import io
import json
import logging
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from sample_factory import make_sample, mixed, png

from infimed import preview
from infimed.contracts import DataFault, Sample, UserError
from infimed.data.facts import write_overlong
from infimed.data.files import File
from infimed.data.index import index_of, index_path
from infimed.data.index_writer import save_index
from infimed.data.quarantine import Quarantine
from infimed.data.records import check_deidentified, convert, sample_to_json
from infimed.data.remote import discreet, parted
from infimed.data.shard_writer import ShardWriter, describe
from infimed.data.shards import open_shards, reindex, verify, write_shards
from infimed.data.store import Store
from infimed.processing.resolution import Resolution

TOOLS = Path(__file__).parents[2] / "tools"
RECORD = sample_to_json(replace(make_sample(0)[0], images=()))
END = bytes(10240)


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def member(name: str, data: bytes, **pax: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data), pax
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def sized(name: str, size: int, *, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Write a header that claims `size` bytes, negative ones too."""
    info = tarfile.TarInfo(name)
    info.type = kind
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % 256**11).to_bytes(11, "big")
    return resummed(head)


def resummed(head: bytearray) -> bytes:
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:512])
    return bytes(head)


# --- tars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "second",
    [
        sized("a.0.png", 2**42),
        sized("a.0.png", -512),  # some versions of tarfile read such a member for ever
        sized("././@LongLink", 2**41, kind=tarfile.GNUTYPE_LONGNAME),
        sized("x", 2**41, kind=tarfile.XHDTYPE),
        member("a.0.png", png(0), size="-4096"),
        member("a.0.png", png(0), size="9" * 23),
        member("a.0.png", png(0), **{"GNU.sparse.map": "0,x"}),
        member("a.0.png", png(0), **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 12}),
    ],
)
def test_a_header_that_lies_about_sizes_is_a_problem_and_nothing_else(tmp_path, second):
    path = tmp_path / "a.tar"
    path.write_bytes(member("a.json", RECORD) + second + png(0) + END)
    with pytest.raises(UserError, match=r"a\.tar: .*copy it again"):
        reindex(path)


def test_tars_put_end_to_end_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    one, other = (member(f"{key}.json", RECORD) + member(f"{key}.0.png", png(0)) + END for key in "ab")
    path.write_bytes(one + other)
    with pytest.raises(UserError, match="a second tar follows the end mark"):
        reindex(path)


def test_names_that_are_no_utf_8_or_hold_long_numbers_are_indexed_and_verified(tmp_path):
    path = tmp_path / "a.tar"
    names = [resummed(bytearray(b"\xff" + member(f"_.{name}", data)[1:])) for name, data in (("json", RECORD), ("0.png", png(0)))]
    long = member("b.json", RECORD) + member(f"b.{'9' * 5000}.png", png(0))
    path.write_bytes(b"".join(names) + long + END)
    reindex(path, defaults={"licence": "CC0-1.0"})
    assert verify(path) == []
    assert [row.key for row in open_shards([path]).rows] == ["\\udcff", "b"]


def test_a_facet_that_is_no_unicode_is_refused_when_it_is_indexed_not_when_it_is_trained_on(tmp_path):
    path = tmp_path / "a.tar"
    record = json.dumps({**json.loads(RECORD), "patient": "\ud800"}).encode()
    path.write_bytes(member("a.json", record) + member("a.0.png", png(0)) + END)
    with pytest.raises(UserError, match="invalid_text: a"):
        reindex(path)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "a.tar"
    parts = [("a.txt", b"\xef\xbb\xbfA head."), ("a.png", png(0)), ("b.json", b'\xef\xbb\xbf{"caption": "A head."}'), ("b.png", png(0))]
    path.write_bytes(b"".join(member(name, data) for name, data in parts) + END)
    reindex(path, defaults={"licence": "CC0-1.0"})
    assert [open_shards([path]).read(row)[0].messages[-1].text for row in (0, 1)] == ["A head."] * 2


def test_a_dicom_bomb_is_a_fault_where_identities_are_looked_for(monkeypatch):
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    file = io.BytesIO()
    dataset.save_as(file)
    monkeypatch.setattr("infimed.processing.dicom._MAX_INFLATED_BYTES", 1000)
    with pytest.raises(DataFault, match="image_too_large"):
        check_deidentified(file.getvalue())
    monkeypatch.undo()
    start = 144 + int.from_bytes(file.getvalue()[140:144], "little")
    with pytest.raises(DataFault, match="undecodable_image"):
        check_deidentified(file.getvalue()[:start] + zlib.compress(b"x"))


def test_a_size_that_no_memory_holds_is_a_fault(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with (tmp_path / "a").open("rb") as file:
        found = File(os.dup(file.fileno())).read(0, 2**60)
    assert isinstance(found, DataFault) and found.reason == "unreadable"


# --- converting ------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path, tokenizer_path, capsys):
    (tmp_path / "images").mkdir()

    def run(text: str, *more: str, name: str = "in.jsonl", encoding: str = "utf-8") -> tuple[int, str]:
        (tmp_path / name).write_bytes(text.encode(encoding))
        args = [tmp_path / name, "--images", tmp_path / "images", "--out", tmp_path / "out", "--tokenizer", tokenizer_path]
        code = load("make_shards").main([*map(str, args), "--licence", "CC0-1.0", *more])
        return code, "".join(capsys.readouterr())

    return run


def asked(**fields: object) -> str:
    return json.dumps({"question": "which?", "answer": "axial", **fields})


@pytest.mark.parametrize("name", ["a\0.png", "x" * 5000, "\ud800.png"])
def test_a_path_that_cannot_be_is_a_missing_image(make, name):
    code, said = make(asked(image=name))
    assert code == 2 and "record 0: missing_image" in said and "--out" not in said


@pytest.mark.parametrize("fields", [{"patient": "\ud800"}, {"choices": ["\ud800"]}])
def test_a_lone_surrogate_in_any_field_is_a_fault_that_can_be_skipped(make, fields):
    code, said = make(asked(**fields) + "\n" + asked(), "--skip-bad")
    assert code == 1 and "invalid_text" in said and "1 samples in 1 shards" in said


def test_ids_that_come_again_or_are_spelled_alike_are_numbered_and_counted(make, tmp_path):
    ids = ["x", "x", "x-2", "x", "患者1", "検査1", "p" * 64 + "1", "p" * 64 + "2"]
    code, said = make("\n".join(asked(id=id) for id in ids))
    assert code == 0 and "5 keys came before and were given a number" in said
    keys = [row.key for row in open_shards([tmp_path / "out"]).rows]
    assert keys == ["x", "x-2", "x-2-2", "x-3", "1", "1-2", "p" * 64, "p" * 64 + "-2"]


def test_numbers_are_spelled_and_what_is_no_number_is_refused():
    sample = convert("k", {"question": "q", "answer": 3, "patient": 12}, images=[], layout={})
    assert (sample.messages[1].text, sample.patient) == ("3", "12")
    for answer in (float("nan"), float("inf"), True):
        with pytest.raises(DataFault, match="schema"):
            convert("k", {"question": "q", "answer": answer}, images=[], layout={})


def test_a_table_with_a_column_twice_is_refused(make):
    code, said = make("question,question,answer\na,b,c\n", name="in.csv")
    assert code == 2 and "columns that come twice: question" in said


def test_a_text_that_is_not_utf_8_names_the_fix(make):
    code, said = make("question,answer\nGröße?,b\n", name="in.csv", encoding="latin1")
    assert code == 2 and "save it as UTF-8" in said


@pytest.mark.parametrize("prefix", ["../evil", "[a", ""])
def test_a_prefix_that_is_no_part_of_a_name_is_refused(tmp_path, prefix):
    with pytest.raises(UserError, match="prefix="):
        ShardWriter(tmp_path, prefix=prefix, max_samples=1, tokenizer="")


def test_a_disk_that_stays_full_leaves_nothing(tmp_path, tokenizer):
    class Full(io.BytesIO):
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    def run_full() -> Iterator[tuple[Sample, list[bytes]]]:
        (first, images), (second, _) = mixed(2)
        yield first, images
        yield second, [png(1)]
        writer._tar._file.close()
        writer._tar._file = Full()
        raise OSError(28, "No space left on device")

    def write() -> None:
        with writer:
            for sample, images in run_full():
                members = writer.add(sample.key, [("json", sample_to_json(sample))], layout=None)
                writer.note(describe(sample, members, images, tokenizer))

    writer = ShardWriter(tmp_path, prefix="a", max_samples=1, tokenizer="")
    with pytest.raises(OSError, match="No space"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_a_mistake_of_the_command_line(tmp_path):
    with pytest.raises(UserError, match=r"--html .*: No such file or directory; name a file"):
        preview.write("x", tmp_path / "nowhere" / "a.html")


@pytest.mark.parametrize("more", [["--ranks", "x"], ["--ranks", "0"], ["--kills", "0"], ["--out", "nowhere/at/all.json"]])
def test_the_resume_check_refuses_what_it_cannot_do_before_it_begins(more, monkeypatch, capsys):
    check = load("resume_check")
    monkeypatch.setattr(check, "check", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(SystemExit) as end:
        check.main(more)
    assert end.value.code == 2 and more[1] in capsys.readouterr().err


def test_an_index_with_a_text_too_long_to_be_counted_is_refused(tmp_path, tokenizer):
    write_shards(mixed(2), tmp_path, tokenizer=tokenizer)
    part = open_shards([tmp_path]).part(0)
    (tar,) = open_shards([tmp_path]).shards
    save_index(index_path(Path(tar.path)), [(tar.tar, replace(part, text_tokens=np.array([2**62, 5])))], tokenizer="")
    with pytest.raises(UserError, match="more tokens than can be"):
        open_shards([tmp_path]).part(0)


# --- addresses -------------------------------------------------------------------------------------------------------


def test_the_query_of_an_address_is_no_part_of_a_name():
    assert parted("https://h/d/a.tar?sig=x/y") == ("https://h/d/", "a.tar", "?sig=x/y")
    assert parted("d/what?/a.tar") == ("d/what?/", "a.tar", "")
    assert index_of("https://h/d/a.tar?sig=x") == "https://h/d/a.index.safetensors?sig=x"
    assert discreet("https://u:p@ss@h/d?sig=x") == "https://h/d"


def test_no_secret_of_an_address_reaches_messages_logs_or_lists(tmp_path, tokenizer, caplog):
    write_shards(mixed(2), tmp_path, tokenizer=tokenizer)
    shards = open_shards([tmp_path])
    row = replace(shards.rows[0], shard="https://user:SECRET@h/a.tar?sig=SECRET", key="a\x1b[31m")
    with caplog.at_level(logging.INFO):
        Quarantine(tmp_path / "q.jsonl").put(row, DataFault("x", "y"), step=0)
    assert "SECRET" not in caplog.text + (tmp_path / "q.jsonl").read_text() and "\x1b" not in caplog.text
    with pytest.raises(UserError, match=r"no such \.tar") as error:
        open_shards(["memory://user:SECRET@nothing/a.tar"], store=Store(retries=0))
    assert "SECRET" not in str(error.value)
    (shard,) = shards.shards
    shards.shards = (replace(shard, path="https://h/a.tar?sig=SECRET"),)
    write_overlong(shards, Resolution(patch_size=4, image_size=8), max_tokens=1, path=tmp_path / "overlong.jsonl")
    assert json.loads((tmp_path / "overlong.jsonl").read_text().splitlines()[0])["shard"] == "a.tar"


def test_checking_what_is_not_on_this_machine_or_cannot_be_written_is_said_in_a_line(tmp_path, tokenizer, capsys, monkeypatch):
    check = load("check_shards")
    assert check.main(["s3://bucket/a.tar"]) == 2 and "copy the shard" in capsys.readouterr().err
    assert check.main(["pipe:ls"]) == 2 and "commands and chained URLs are not run" in capsys.readouterr().err

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "a.index.safetensors.part")

    monkeypatch.setattr(check, "reindex", refuse)
    (tar,) = write_shards(mixed(1), tmp_path, tokenizer=tokenizer)
    assert check.main(["--reindex", str(tar)]) == 1
    assert "a.index.safetensors.part: Permission denied; make it readable" in capsys.readouterr().out
