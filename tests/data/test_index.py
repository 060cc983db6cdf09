"""The index file: small, standard, written the same way every time, and never believed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from infimed.contracts import UserError
from infimed.data.index import FACETS, MERGED, Columns, Member, Row, Tar, index_path, read_header
from infimed.data.index_writer import part_of, save_index, write_index
from infimed.processing.resolution import Resolution

ROWS = [
    Row(
        "",
        f"füß/{n:03d}",
        (Member("json", 512, 300 + n, 2**32 - 1 - n), *(Member(f"{i}.png", 2**33 + 1000 * n + i, 90, i) for i in range(n % 3))),
        70_000 if n == 5 else n,
        tuple((n, 2 * n) for _ in range(n % 3)),
        tuple(3 + i for i in range(n % 3)),
        *(f"{facet} {n % (i + 2)}" for i, facet in enumerate(FACETS)),
    )
    for n in range(20)
]
SIZE = 2**34


def written(tmp_path, rows=ROWS, **changes):
    tar = tmp_path / "a.tar"
    write_index(tar, rows, **{"sha256": "f" * 64, "size": SIZE, "tokenizer": "abc", **changes})
    return tar


def rows_of(path, number=0):
    part = Columns(read_header(str(path), "a.tar")).part(number)
    return [part.row(place, "") for place in range(len(part))]


def test_rows_come_back_as_they_were_written(tmp_path):
    tar = written(tmp_path, layout={"source": "x"})
    header = read_header(str(index_path(tar)), "a.tar")
    assert rows_of(index_path(tar)) == ROWS
    assert (header.tokenizer, header.tars) == ("abc", (Tar("a.tar", 20, SIZE, "f" * 64, {"source": "x"}),))
    assert rows_of(index_path(written(tmp_path, rows=[]))) == []


def test_any_safetensors_reader_opens_it_and_numbers_take_the_fewest_bytes(tmp_path):
    columns = load_file(index_path(written(tmp_path)))
    assert {name: columns[name].dtype.itemsize for name in ("task", "text_tokens", "offset", "crc32", "size", "member_bounds")} == {
        "task": 1,
        "text_tokens": 4,
        "offset": 8,
        "crc32": 4,
        "size": 2,
        "member_bounds": 1,
    }
    assert columns["text_tokens"].tolist() == [row.text_tokens for row in ROWS]


def test_equal_rows_make_equal_bytes_whatever_index_they_come_from(tmp_path):
    halves = [(Tar(f"{i}.tar", 10, SIZE, "", None), part_of(ROWS[10 * i : 10 * i + 10])) for i in range(2)]
    save_index(tmp_path / "direct.index", halves, tokenizer="t")
    for half in halves:
        save_index(tmp_path / f"{half[0].name}.index", [half], tokenizer="t")
    loaded = [Columns(read_header(str(tmp_path / f"{i}.tar.index"), "")).part(0) for i in range(2)]
    save_index(tmp_path / "loaded.index", [(tar, part) for (tar, _), part in zip(halves, loaded, strict=True)], tokenizer="t")
    assert (tmp_path / "direct.index").read_bytes() == (tmp_path / "loaded.index").read_bytes()
    assert rows_of(tmp_path / "direct.index", 0) + rows_of(tmp_path / "direct.index", 1) == ROWS


def test_writing_one_index_removes_the_merged_one_that_would_hide_it(tmp_path):
    (tmp_path / MERGED).write_text("old")
    written(tmp_path)
    assert not (tmp_path / MERGED).exists()


def test_an_index_that_is_written_again_is_not_mixed_with_the_header_of_before(tmp_path):
    path = index_path(written(tmp_path))
    before = read_header(str(path), "a.tar")
    written(tmp_path, rows=ROWS[:10])
    with pytest.raises(UserError, match="written again after it was opened"):
        Columns(before)


def changed(path, edit):
    """Rewrite the header of an index; `edit` gets the columns' specs and our own part."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    specs = json.loads(data[8 : 8 + length])
    ours = json.loads(specs["__metadata__"]["infimed_index"])
    edit(specs, ours)
    specs["__metadata__"]["infimed_index"] = json.dumps(ours)
    text = json.dumps(specs).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda specs, ours: ours.update(format=3), "format 3, expected 2"),
        (lambda specs, ours: ours.pop("tars"), "KeyError: 'tars'"),
        (lambda specs, ours: ours["tars"][0].__setitem__(1, 21), "counts that are no sum"),
        (lambda specs, ours: ours["tars"][0].__setitem__(1, -1), "-1 where a count is expected"),
        (lambda specs, ours: ours["tars"][0].__setitem__(1, 10**30), "where a count is expected"),
        (lambda specs, ours: ours["tars"][0].__setitem__(4, 9), "IndexError"),
        (lambda specs, ours: ours["tars"][0].__setitem__(2, 2**32), "a member lies outside the tar"),
        (lambda specs, ours: ours["tars"][0].__setitem__(0, 7), "7 where a text is expected"),
        (lambda specs, ours: ours["sources"].__setitem__(0, None), "None where a text is expected"),
        (lambda specs, ours: specs.pop("offset"), "KeyError: 'offset'"),
        (lambda specs, ours: specs["offset"].update(dtype="F64"), "KeyError: 'F64'"),
        (lambda specs, ours: specs["offset"].update(shape=[2**40]), "a column outside the file"),
        (lambda specs, ours: specs["offset"].update(shape=[5], data_offsets=[0, 40]), "39 values of size, expected 5"),
        (lambda specs, ours: specs["offset"].update(data_offsets=[2**40, 2**40 + 312]), "a column outside the file"),
        (lambda specs, ours: specs["text_tokens"].update(dtype="U8", shape=[80]), "80 values of text_tokens, expected 20"),
        (lambda specs, ours: specs["offset"].update(data_offsets=[x + 1 for x in specs["offset"]["data_offsets"]]), "not aligned"),
        (lambda specs, ours: specs.update(task=specs["text_tokens"]), "codes of task outside their table"),
        (lambda specs, ours: specs.update(member_bounds=specs["key_bounds"]), "members out of order"),
        (lambda specs, ours: specs.update(name_table=specs["key"]), "texts whose bounds are out of order"),
        (lambda specs, ours: specs.update(source=specs["domain"]), "codes of source outside their table"),
        (lambda specs, ours: ours["tars"][0].__setitem__(5, [11, 9]), "other counts of sources than its rows"),
    ],
)
def test_an_index_that_lies_is_one_error_that_names_the_fix(tmp_path, edit, said):
    path = index_path(written(tmp_path))
    changed(path, edit)
    with pytest.raises(UserError, match=said) as error:
        rows_of(path)
    assert f"check_shards.py --reindex {tmp_path / 'a.tar'}" in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 4,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[" * 9,
        b"\x04\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0{}",
        b"x" * 99,
    ],
)
def test_bytes_that_are_no_index_are_one_error_and_no_memory(tmp_path, data):
    path = index_path(tmp_path / "a.tar")
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as an index"):
        rows_of(path)


def test_a_header_that_claims_more_than_there_is_is_not_asked_for(tmp_path):
    path = index_path(written(tmp_path))
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(UserError, match=f"a header of {2**40} bytes in a file of {path.stat().st_size}"):
        rows_of(path)


def test_no_flipped_byte_makes_the_reader_do_anything_but_refuse_or_read_other_numbers(tmp_path):
    path = index_path(written(tmp_path))
    sound, draw, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        data = bytearray(sound)
        data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
        path.write_bytes(data)
        try:
            assert len(rows_of(path)) == 20
        except UserError:
            refused += 1
    assert 100 < refused < 400


def test_the_fix_for_a_merged_index_is_to_merge_again(tmp_path):
    save_index(tmp_path / MERGED, [(Tar("a.tar", 20, 5, "", None), part_of(ROWS))], tokenizer="")
    with pytest.raises(UserError, match=f"merge_shards.py --index-only {tmp_path}"):
        rows_of(tmp_path / MERGED)


def test_a_row_knows_its_length():
    row = replace(ROWS[2], image_sizes=((50, 60), (0, 0)))
    assert row.length(Resolution(patch_size=14, image_size=56, visual_grid=2)) == 2 + 4
