"""Shards: written once, read by any WebDataset reader, and never believed blindly."""

import hashlib
import json
import pickle
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import webdataset
from sample_factory import make_sample, mixed, png

from infimed.contracts import DataFault, UserError
from infimed.data.index import index_path, sample_from_json, sample_to_json
from infimed.data.shards import open_shards, reindex, verify, write_shards
from infimed.processing.chat import count_tokens
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer, train_tokenizer


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())]


def damage(tar: Path, offset: int) -> None:
    with tar.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def test_what_was_written_is_read_back_in_order(shards_path, tokenizer):
    shards = open_shards([shards_path])
    assert [shards.read(i) for i in range(len(shards))] == [(sample, tuple(images)) for sample, images in mixed(60)]
    assert [row.text_tokens for row in shards.rows] == [count_tokens(sample.messages, tokenizer) for sample, _ in mixed(60)]
    assert shards.rows[2].image_sizes == ((8, 8), (8, 8))
    assert shards.rows[2].length(Resolution(patch_size=4, image_size=16, visual_grid=3)) == shards.rows[2].text_tokens + 18
    assert shards.sources == ("alpha", "beta", "gamma")


def test_equal_samples_make_equal_bytes_and_another_sample_does_not(tmp_path, shards_path, tokenizer):
    write_shards(mixed(60), tmp_path / "again", max_samples=20, tokenizer=tokenizer)
    assert digests(tmp_path / "again") == digests(shards_path)
    with tarfile.open(tmp_path / "again" / "shard-000001.tar") as tar:
        assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}
    write_shards([*mixed(59), make_sample(99)], tmp_path / "other", max_samples=20, tokenizer=tokenizer)
    assert digests(tmp_path / "other") != digests(shards_path)


def test_the_webdataset_library_opens_our_shards(shards_path):
    urls = [str(path) for path in sorted(shards_path.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [item["__key__"] for item in found] == [sample.key for sample, _ in mixed(60)]
    assert [item.get("1.png") for item in found] == [images[1] if len(images) > 1 else None for _, images in mixed(60)]
    assert json.loads(found[5]["json"])["source"] == "gamma"


def test_a_sound_shard_has_no_problem_and_survives_pickling(shards_path):
    assert [problem for tar in shards_path.glob("*.tar") for problem in verify(tar)] == []
    shards = open_shards([shards_path])
    shards.read(0)
    assert pickle.loads(pickle.dumps(shards)).read(3) == shards.read(3)


def test_a_flipped_byte_is_a_checksum_fault_of_that_sample_alone(tmp_path, tokenizer):
    (tar,) = write_shards(mixed(6), tmp_path, tokenizer=tokenizer)
    shards = open_shards([tar])
    damage(tar, shards.rows[4].members[1].offset + 20)
    with pytest.raises(DataFault, match=r"checksum: s00004\.0\.png"):
        shards.read(4)
    assert shards.read(5)[0].key == "s00005"
    assert any("checksum: s00004.0.png" in problem for problem in verify(tar))


def test_every_broken_path_is_named_at_once(tmp_path, tokenizer):
    write_shards(mixed(6), tmp_path, max_samples=2, tokenizer=tokenizer)
    first, second, third = sorted(tmp_path.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:2000])
    index_path(second).unlink()
    index_path(third).write_text('{"header": {"format": 99}}')
    with pytest.raises(UserError) as error:
        open_shards([tmp_path, tmp_path / "nowhere"])
    text = str(error.value)
    assert "ends early: 2000 bytes" in text
    assert f"check_shards.py --reindex {second}" in text
    assert "format 99, expected 1" in text
    assert "nowhere: no such .tar" in text


def test_an_index_that_points_outside_its_tar_is_refused(tmp_path, tokenizer):
    (tar,) = write_shards(mixed(1), tmp_path, tokenizer=tokenizer)
    index_path(tar).write_text(index_path(tar).read_text().replace('["json", 512,', '["json", 51200,'))
    with pytest.raises(UserError, match="lies outside the tar"):
        open_shards([tar])


def test_reindexing_gives_the_writers_index(tmp_path, tokenizer):
    (tar,) = write_shards(mixed(9), tmp_path, tokenizer=tokenizer)
    before = index_path(tar).read_bytes()
    index_path(tar).unlink()
    reindex(tar, tokenizer=tokenizer)
    assert index_path(tar).read_bytes() == before


@pytest.mark.parametrize("cut", [600, 3000, -1024])
def test_a_tar_that_ends_early_cannot_be_indexed(tmp_path, tokenizer, cut):
    (tar,) = write_shards(mixed(1), tmp_path, tokenizer=tokenizer)
    with tarfile.open(tar) as archive:
        end = max(info.offset_data + -(-info.size // 512) * 512 for info in archive)
    tar.write_bytes(tar.read_bytes()[: cut if 0 < cut < end else end])
    with pytest.raises(UserError, match="ends early"):
        reindex(tar)


def test_a_key_that_comes_back_is_refused(tmp_path):
    record = sample_to_json(make_sample(0)[0])
    write_tar(tmp_path / "a.tar", [("a.json", record), ("b.json", record), ("a.0.png", png(0))])
    with pytest.raises(UserError, match="key 'a' comes back"):
        reindex(tmp_path / "a.tar")


def test_a_foreign_tar_is_indexed_counted_at_opening_and_its_names_are_never_paths(tmp_path, tokenizer, caplog):
    sample, images = make_sample(3)
    write_tar(tmp_path / "a.tar", [("../../etc/x.0.png", images[0]), ("../../etc/x.json", sample_to_json(replace(sample, images=())))])
    reindex(tmp_path / "a.tar")
    with caplog.at_level("INFO"):
        shards = open_shards([tmp_path]).counted_with(tokenizer)
    assert shards.rows[0].text_tokens == count_tokens(sample.messages, tokenizer)
    assert len([r for r in caplog.records if "again" in r.message]) == 1
    assert shards.read(0) == (replace(sample, key="../../etc/x"), tuple(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.index.json", "a.tar"]


def test_text_is_counted_again_for_another_tokenizer(shards_path, tokenizer, tmp_path):
    train_tokenizer(["nothing alike"], vocab_size=300).save(str(tmp_path / "tokenizer.json"))
    other = Tokenizer.load(tmp_path)
    shards = open_shards([shards_path])
    assert shards.counted_with(tokenizer) is shards
    assert [row.text_tokens for row in shards.counted_with(other).rows] == [count_tokens(s.messages, other) for s, _ in mixed(60)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer_type": "essay"}, "answer_type 'essay' is none of"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"organ": 3}, "organ is not text"),
        ({"messages": []}, "messages is not a list"),
        ({"messages": [{"role": "robot", "text": "x"}]}, "role 'robot'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is not"),
        ({"images": "0.png"}, "images is not a list"),
    ],
)
def test_a_wrong_field_is_a_schema_fault_that_names_it(change, said):
    record = json.loads(sample_to_json(make_sample(0)[0])) | change
    with pytest.raises(DataFault, match=said) as fault:
        sample_from_json("k", json.dumps(record).encode())
    assert fault.value.reason == "schema"


@pytest.mark.parametrize("data", [b"{", b"[1]", b"[" * 200_000, b"\xff"])
def test_bytes_that_are_no_record_are_a_schema_fault(data):
    with pytest.raises(DataFault, match="schema"):
        sample_from_json("k", data)


def test_the_writer_refuses_what_no_reader_could_use(tmp_path, tokenizer):
    sample, images = make_sample(0)
    for bad, said in [
        (replace(sample, key="a.b"), "a dot would end the key"),
        (replace(sample, key="../a"), "expected letters"),
        (replace(sample, images=("1.png",)), "expected 0.EXTENSION"),
        (replace(sample, images=()), "names 0 members, but 1 images"),
    ]:
        with pytest.raises(UserError, match=said):
            write_shards([(bad, images)], tmp_path, tokenizer=tokenizer)
    with pytest.raises(UserError, match="comes twice"):
        write_shards([(sample, images)] * 2, tmp_path, tokenizer=tokenizer)
    with pytest.raises(DataFault, match="image_mismatch: s00000: 1 placeholders, 0 images"):
        write_shards([(replace(sample, images=()), [])], tmp_path, tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
    write_shards([(sample, images)], tmp_path, tokenizer=tokenizer)
    with pytest.raises(UserError, match="already holds 1 shard-"):
        write_shards([(sample, images)], tmp_path, tokenizer=tokenizer)
