"""Shards: written once, read by any WebDataset reader, and never believed blindly."""

import hashlib
import json
import logging
import mmap
import pickle
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from sample_factory import make_sample, mixed, png

import infimed.data.shards as shards_module
from infimed.contracts import DataFault, UserError
from infimed.data.index import MERGED, index_path
from infimed.data.records import sample_to_json
from infimed.data.shard_merge import merge_indexes
from infimed.data.shards import open_shards, reindex, verify, write_shards
from infimed.data.store import Store
from infimed.processing.chat import count_tokens, measure_text
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


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def ours(number: int = 0) -> bytes:
    return sample_to_json(make_sample(number)[0])


CAPTION = {"licence": "CC0-1.0"}


# --- writing and reading ---------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back_in_order(shards_path, tokenizer):
    shards = open_shards([shards_path])
    assert [shards.read(i) for i in range(len(shards))] == [(sample, tuple(images)) for sample, images in mixed(60)]
    assert [row.text_tokens for row in shards.rows] == [count_tokens(sample.messages, tokenizer) for sample, _ in mixed(60)]
    assert [row.image_at for row in shards.rows] == [measure_text(sample.messages, tokenizer).image_at for sample, _ in mixed(60)]
    assert shards.rows[2].image_sizes == ((8, 8), (8, 8))
    assert shards.rows[2].length(Resolution(patch_size=4, image_size=16, visual_grid=3)) == shards.rows[2].text_tokens + 18
    assert shards.sources == ("alpha", "beta", "gamma")
    assert (shards.rows[-1], len(shards.rows)) == (shards.rows[59], 60)
    with pytest.raises(IndexError):
        shards.rows[60]


def test_many_samples_are_read_in_the_order_asked_for(shards_path):
    shards, order = open_shards([shards_path]), [41, 3, 59, 3, 0, 20]
    assert shards.read_many(order) == [shards.read(i) for i in order]


def test_neighbours_are_read_at_once_and_what_lies_far_apart_is_not(tmp_path, shards_path, monkeypatch):
    asked = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, requests: asked.append([r.size for r in requests]) or read(self, requests))
    shards = open_shards([shards_path])
    shards.read_many([2, 30, 5])
    assert [len(sizes) for sizes in asked] == [3]
    reindex(write_tar(tmp_path / "a.tar", [("x.jpg", png(1)), ("x.npy", bytes(100_000)), ("x.txt", b"a head")]), defaults=CAPTION)
    open_shards([tmp_path]).read(0)
    assert asked[1] == [len(b"a head"), len(png(1))]


def test_equal_samples_make_equal_bytes_and_another_sample_does_not(tmp_path, shards_path, tokenizer):
    write_shards(mixed(60), tmp_path / "again", max_samples=20, tokenizer=tokenizer)
    assert digests(tmp_path / "again") == digests(shards_path)
    with tarfile.open(tmp_path / "again" / "shard-000001.tar") as tar:
        assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}
    write_shards([*mixed(59), make_sample(99)], tmp_path / "other", max_samples=20, tokenizer=tokenizer)
    assert digests(tmp_path / "other") != digests(shards_path)


def test_a_sample_is_written_before_the_next_one_is_asked_for(tmp_path, tokenizer):
    size = []

    def samples():
        for sample in mixed(40):
            yield sample
            size.append(sum(file.stat().st_size for file in tmp_path.iterdir()))

    write_shards(samples(), tmp_path, max_samples=100, tokenizer=tokenizer)
    assert size[-1] > size[20]  # the buffer of the file holds a few samples


def test_the_webdataset_library_opens_and_decodes_our_shards(shards_path):
    urls = [str(path) for path in sorted(shards_path.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [item["__key__"] for item in found] == [sample.key for sample, _ in mixed(60)]
    assert [item.get("1.png") for item in found] == [images[1] if len(images) > 1 else None for _, images in mixed(60)]
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    assert decoded[5]["json"]["source"] == "gamma"
    assert decoded[5]["1.png"].size == (8, 8)


def test_a_sound_shard_has_no_problem_and_survives_pickling(shards_path):
    assert [problem for tar in shards_path.glob("*.tar") for problem in verify(tar)] == []
    shards = open_shards([shards_path])
    shards.read(0)
    assert pickle.loads(pickle.dumps(shards)).read(3) == shards.read(3)


def test_opening_reads_headers_alone(shards_path, monkeypatch):
    monkeypatch.setattr(shards_module, "Columns", None)
    monkeypatch.setattr(mmap, "mmap", None)
    shards = open_shards([shards_path])
    assert (len(shards), shards.counts.sum(axis=1).tolist(), len(shards.fingerprint)) == (60, [20, 20, 20], 16)
    with pytest.raises(TypeError):
        shards.read(0)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_a_checksum_fault_of_that_sample_alone(tmp_path, tokenizer):
    (tar,) = write_shards(mixed(6), tmp_path, tokenizer=tokenizer)
    shards = open_shards([tar])
    damage(tar, shards.rows[4].members[1].offset + 20)
    with pytest.raises(DataFault, match=r"checksum: s00004\.0\.png"):
        shards.read(4)
    found = shards.read_many([3, 4, 5])
    assert [getattr(one, "reason", "good") for one in found] == ["good", "checksum", "good"]
    assert found[2][0].key == "s00005"
    assert any("checksum: s00004.0.png" in problem for problem in verify(tar))
    damage(tar, shards.rows[5].members[0].offset)
    with pytest.raises(DataFault, match=r"checksum: s00005\.json"):
        shards.read(5)


def test_a_tar_that_ends_early_warns_and_costs_only_the_samples_beyond_its_end(tmp_path, tokenizer, caplog):
    (tar,) = write_shards(mixed(9), tmp_path, tokenizer=tokenizer)
    cut = open_shards([tar]).rows[5].members[1].offset + 10
    tar.write_bytes(tar.read_bytes()[:cut])
    with caplog.at_level("WARNING"):
        shards = open_shards([tar])
    assert f"ends early: {cut} bytes" in caplog.text and "reindex" not in caplog.text
    assert [getattr(one, "reason", "good") for one in shards.read_many(range(9))] == ["good"] * 5 + ["truncated"] * 4
    assert shards.read_many([5])[0].detail.startswith("s00005.0.png: 10 of ")
    problems = "\n".join(verify(tar))
    assert "ends early" in problems and "reindex" not in problems


def test_a_tar_that_vanishes_is_unreadable_not_a_crash(tmp_path, tokenizer):
    (tar,) = write_shards(mixed(2), tmp_path, tokenizer=tokenizer)
    shards = open_shards([tar])
    tar.unlink()
    assert [fault.reason for fault in shards.read_many([0, 1])] == ["unreadable", "unreadable"]


def test_every_broken_path_is_named_at_once(tmp_path, tokenizer):
    write_shards(mixed(8), tmp_path, max_samples=2, tokenizer=tokenizer)
    first, second, third, fourth = sorted(tmp_path.glob("*.tar"))
    first.write_bytes(first.read_bytes() + b"more")
    index_path(second).unlink()
    index_path(third).write_bytes(b"\2\0\0\0\0\0\0\0{}")
    index_path(fourth).rename(fourth.with_suffix(".index.json"))
    with pytest.raises(UserError) as error:
        open_shards([tmp_path, tmp_path / "nowhere"])
    text = str(error.value)
    assert "longer than its index says" in text
    assert f"check_shards.py --reindex {second}" in text
    assert f"{index_path(third)}: cannot be read as an index" in text
    assert f"{fourth.stem}.index.json is of an older format" in text and f"check_shards.py --reindex {fourth}" in text
    assert "nowhere: no such .tar" in text


def test_shards_in_a_remote_store_are_opened_and_read_by_single_or_merged_index(tmp_path, tokenizer):
    write_shards(mixed(30), tmp_path / "a", max_samples=20, tokenizer=tokenizer)
    local = open_shards([tmp_path / "a"])
    for name in ("single", "merged"):
        fsspec.filesystem("memory").put(str(tmp_path / "a"), f"/{name}", recursive=True)
        merge_indexes(tmp_path / "a")
    for name in ("single", "merged"):
        remote = open_shards([f"memory://{name}"])
        assert remote.shards[0].header.where.startswith("memory://") and len({s.header.path for s in remote.shards}) == 1 + (
            name == "single"
        )
        assert remote.fingerprint == local.fingerprint and remote.read_many([25, 3]) == local.read_many([25, 3])
    with pytest.raises(UserError, match=r"shards=memory://nowhere: no such"):
        open_shards(["memory://nowhere"])


# --- selecting -------------------------------------------------------------------------------------------------------


def test_select_keeps_the_rows_whose_facets_all_match(shards_path):
    shards = open_shards([shards_path])
    kept = shards.select({"source": ["alpha", "beta"], "task": ["level"]})
    assert [row.key for row in kept.rows] == [f"s{n:05d}" for n in range(60) if n % 3 != 2 and n % 2 == 1]
    assert kept.sources == ("alpha", "beta")
    assert kept.select({"source": "beta"}).read(0)[0].source == "beta"
    assert shards.select({}) is shards
    assert len({shards.fingerprint, kept.fingerprint, kept.select({"source": "beta"}).fingerprint}) == 3


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ({"sauce": ["alpha"]}, "select.sauce: no such field; did you mean source?"),
        ({"source": ["alpah"]}, "select.source=alpah: no sample has it; did you mean alpha?"),
        ({"source": ["alpha"], "domain": ["shifted"]}, "select.domain=shifted: no sample has it"),
        ({"source": []}, "none of 60 samples matches"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_with_the_nearest_name(shards_path, select, said):
    with pytest.raises(UserError) as error:
        open_shards([shards_path]).select(select)
    assert said in str(error.value)


def test_values_that_no_row_has_may_be_asked_for_when_that_is_not_strict(shards_path):
    assert len(open_shards([shards_path]).select({"source": ["alpha", "other"]}, strict=False)) == 20


def test_a_subset_keeps_its_order_and_is_another_set(shards_path):
    shards = open_shards([shards_path])
    part = shards.subset([50, 2, 41]).subset(np.array([2, 0]))
    assert [row.key for row in part.rows] == ["s00041", "s00050"]
    assert [sample.key for sample, _ in part.read_many([1, 0])] == ["s00050", "s00041"]
    assert part.counts.sum() == 2 and part.sources == ("gamma",)
    assert part.fingerprint not in (shards.fingerprint, shards.subset([50, 41]).fingerprint)


def test_only_the_named_samples_stay_whatever_folder_they_were_in(shards_path, caplog):
    shards = open_shards([shards_path])
    some = {("/elsewhere/shard-000001.tar", "s00025"), ("shard-000000.tar", "s00003"), ("shard-000000.tar", "s00025")}
    assert [row.key for row in shards.only(some).rows] == ["s00003", "s00025"]
    assert "2 of the 3 samples" in caplog.text
    with pytest.raises(UserError, match="none of the 1 samples asked for"):
        shards.only({("other.tar", "s00003")})


def test_the_fingerprint_is_that_of_the_data_wherever_it_lies(tmp_path, shards_path, tokenizer):
    write_shards(mixed(60), tmp_path / "again", max_samples=20, tokenizer=tokenizer)
    assert open_shards([tmp_path / "again"]).fingerprint == open_shards([shards_path]).fingerprint
    assert open_shards([*(tmp_path / "again").glob("*1.tar")]).fingerprint != open_shards([shards_path]).fingerprint


def test_text_is_counted_again_for_another_tokenizer(shards_path, tokenizer, tmp_path):
    train_tokenizer(["nothing alike"], vocab_size=300).save(str(tmp_path / "tokenizer.json"))
    other = Tokenizer.load(tmp_path)
    shards = open_shards([shards_path])
    assert shards.counted_with(tokenizer) is shards
    again = pickle.loads(pickle.dumps(shards.counted_with(other).select({"task": "level"})))
    assert again.counted_with(other) is again
    expected = [measure_text(sample.messages, other) for sample, _ in mixed(60) if sample.task == "level"]
    assert [(row.text_tokens, row.image_at) for row in again.rows] == [(text.tokens, text.image_at) for text in expected]
    assert [row.text_tokens for row in again.counted_with(tokenizer).rows] == [
        row.text_tokens for row in shards.select({"task": "level"}).rows
    ]


# --- the merged index ------------------------------------------------------------------------------------------------


def test_a_merged_index_gives_the_same_set_as_the_single_ones(tmp_path, tokenizer):
    write_shards(mixed(60), tmp_path, max_samples=20, tokenizer=tokenizer)
    single = open_shards([tmp_path])
    rows, fingerprint, counts = list(single.rows), single.fingerprint, single.counts
    content = merge_indexes(tmp_path).read_bytes()
    for tar in tmp_path.glob("*.tar"):
        index_path(tar).unlink()
    merged = open_shards([tmp_path])
    assert (list(merged.rows), merged.fingerprint) == (rows, fingerprint) and (merged.counts == counts).all()
    assert merged.read(30) == single.read(30)
    assert len(open_shards([tmp_path / "shard-000002.tar"])) == 20
    assert merge_indexes(tmp_path).read_bytes() == content
    assert [problem for tar in tmp_path.glob("*.tar") for problem in verify(tar)] == []


def test_a_tar_and_its_index_may_be_renamed_and_the_merged_index_says_the_new_name(tmp_path, tokenizer):
    (tar,) = write_shards(mixed(3), tmp_path, tokenizer=tokenizer)
    index_path(tar).rename(tmp_path / "b.index.safetensors")
    tar.rename(tmp_path / "b.tar")
    before = open_shards([tmp_path]).fingerprint
    merge_indexes(tmp_path)
    assert verify(tmp_path / "b.tar") == []
    (tmp_path / "b.index.safetensors").unlink()
    assert open_shards([tmp_path]).fingerprint == before


def test_a_merged_index_of_other_tars_than_those_there_is_not_used(tmp_path, tokenizer, caplog):
    write_shards(mixed(40), tmp_path, max_samples=20, tokenizer=tokenizer)
    merge_indexes(tmp_path)
    merged = (tmp_path / MERGED).read_bytes()
    write_shards(mixed(3), tmp_path, prefix="more", tokenizer=tokenizer)
    (tmp_path / MERGED).write_bytes(merged)
    assert len(open_shards([tmp_path])) == 43
    assert "describes other tars" in caplog.text


def test_the_checker_sees_that_a_merged_index_differs_from_the_one_beside_the_tar(tmp_path, tokenizer):
    (tar,) = write_shards(mixed(3), tmp_path, tokenizer=tokenizer)
    stale = merge_indexes(tmp_path).read_bytes()
    reindex(tar)
    (tmp_path / MERGED).write_bytes(stale)
    assert any("differ" in problem for problem in verify(tar))


# --- tars made elsewhere ---------------------------------------------------------------------------------------------


def test_reindexing_gives_the_writers_index(tmp_path, tokenizer):
    (tar,) = write_shards(mixed(9), tmp_path, tokenizer=tokenizer)
    before = index_path(tar).read_bytes()
    index_path(tar).unlink()
    reindex(tar, tokenizer=tokenizer)
    assert index_path(tar).read_bytes() == before


def test_a_tar_of_the_webdataset_library_is_read(tmp_path, tokenizer):
    turns = {"conversations": [{"from": "human", "value": "<image>which?"}, {"from": "gpt", "value": "axial"}], "licence": "CC0-1.0"}
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=True) as sink:
        sink.write({"__key__": "deep/er/x1", "png": png(1), "json": turns, "cls": 3, "npy": np.zeros(5000)})
        sink.write({"__key__": "x2", "0.png": png(2), "1.PNG": png(3), "txt": "two pictures", "json": {"url": "http://x"}})
        sink.write({"__key__": "x3", "txt": "no picture"})
    reindex(tmp_path / "a.tar", tokenizer=tokenizer, defaults={"source": "web", "licence": "MIT", "prompt": "Say it."})
    shards = open_shards([tmp_path])
    (first, one), (second, two), (third, none) = shards.read_many([0, 1, 2])
    assert (first.key, first.messages[1].text, one, first.licence) == ("deep/er/x1", "axial", (png(1),), "CC0-1.0")
    assert (second.messages[0].text, second.messages[1].text) == ("<image><image>\nSay it.", "two pictures")
    assert (two, second.images, second.licence, second.answer_type) == ((png(2), png(3)), ("0.png", "1.PNG"), "MIT", "caption")
    assert (third.messages[0].text, none, shards.sources) == ("Say it.", (), ("web",))
    assert [row.text_tokens for row in shards.rows] == [count_tokens(sample.messages, tokenizer) for sample in (first, second, third)]
    assert verify(tmp_path / "a.tar") == []


def test_members_in_any_order_with_something_large_between_them_are_read(tmp_path):
    between = [("x.jpg", png(1)), ("x.npy", bytes(100_000)), ("x.txt", b"a head"), ("y.txt", b"an arm"), ("y.dcm.png", png(2))]
    reindex(write_tar(tmp_path / "a.tar", between), defaults=CAPTION)
    shards = open_shards([tmp_path])
    assert [(sample.messages[1].text, images) for sample, images in shards.read_many([0, 1])] == [
        ("a head", (png(1),)),
        ("an arm", (png(2),)),
    ]
    assert [member.name for member in shards.rows[1].members] == ["txt", "dcm.png"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_of_every_tar_format_are_read(tmp_path, format):
    folder = "/".join(["läng" * 8] * 3) if format != tarfile.USTAR_FORMAT else "l" * 90
    members = [(f"{folder}/{'x' * 60}.{name}", data) for name, data in (("json", ours()), ("0.png", png(0)))]
    path = write_tar(tmp_path / "a.tar", [*members, ("./.hidden", b""), ("._x.json", b"{}"), ("README", b"")], format)
    reindex(path)
    assert open_shards([path]).read(0) == (replace(make_sample(0)[0], key=f"{folder}/{'x' * 60}"), (png(0),))


def test_what_follows_the_end_mark_is_not_read_and_what_stands_in_its_place_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.json", ours()), ("a.0.png", png(0))])
    sound = path.read_bytes()
    path.write_bytes(sound + b"garbage" * 999)
    reindex(path)
    assert len(open_shards([path])) == 1 and verify(path) == []
    path.write_bytes(sound[: 4 * 512] + b"garbage" * 999)
    with pytest.raises(UserError, match="neither a member nor the end mark at byte"):
        reindex(path)


@pytest.mark.parametrize("cut", [600, 3000, -1024])
def test_a_tar_that_ends_early_cannot_be_indexed(tmp_path, tokenizer, cut):
    (tar,) = write_shards(mixed(1), tmp_path, tokenizer=tokenizer)
    with tarfile.open(tar) as archive:
        end = max(info.offset_data + -(-info.size // 512) * 512 for info in archive)
    tar.write_bytes(tar.read_bytes()[: cut if 0 < cut < end else end])
    with pytest.raises(UserError, match="ends early"):
        reindex(tar)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.json", ours()), ("b.json", ours()), ("a.0.png", png(0))], "key 'a' comes back"),
        ([("a.json", ours()), ("a.json", ours())], "a.json comes twice"),
        ([("a.jpg", png(0)), ("a.cls", b"3")], "neither a .json with a conversation nor a .txt caption"),
        ([("a.jpg", png(0)), ("a.json", b"{")], "not JSON"),
        ([("a.jpg", png(0)), ("a.json", b'{"url": "x"}')], "no caption"),
        ([("a.json", b'{"messages": [{"from": "human", "value": "<image>"}]}')], "image_mismatch: a: 1 placeholders, 0 images"),
    ],
)
def test_a_tar_that_makes_no_sense_is_refused(tmp_path, members, said):
    with pytest.raises(UserError, match=said):
        reindex(write_tar(tmp_path / "a.tar", members), defaults=CAPTION)


def test_a_foreign_tar_without_a_licence_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", png(0)), ("a.txt", b"x")])
    with pytest.raises(UserError, match="no_licence"):
        reindex(path)


def test_our_own_tars_are_read_strictly(tmp_path, tokenizer):
    records = [json.loads(ours(n)) for n in range(2)]
    records[1]["modallity"] = "CT"
    members = [(f"{n}.{name}", data) for n in range(2) for name, data in (("json", json.dumps(records[n]).encode()), ("0.png", png(n)))]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match="unknown field 'modallity'"):
        reindex(path)
    reindex(path, defaults={"source": "x"})
    assert len(open_shards([path])) == 2


def test_a_foreign_tar_is_counted_at_opening_and_its_names_are_never_paths(tmp_path, tokenizer, caplog):
    sample, images = make_sample(3)
    write_tar(tmp_path / "a.tar", [("../../etc/x.0.png", images[0]), ("../../etc/x.json", sample_to_json(replace(sample, images=())))])
    reindex(tmp_path / "a.tar")
    with caplog.at_level(logging.INFO):
        shards = open_shards([tmp_path]).counted_with(tokenizer)
    text = measure_text(sample.messages, tokenizer)
    assert (shards.rows[0].text_tokens, shards.rows[0].image_at) == (text.tokens, text.image_at)
    assert len([r for r in caplog.records if "again" in r.message]) == 1
    assert shards.read(0) == (replace(sample, key="../../etc/x"), tuple(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.index.safetensors", "a.tar"]


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
        write_shards([(sample, images)] * 2, tmp_path, max_samples=1, tokenizer=tokenizer)
    with pytest.raises(DataFault, match="image_mismatch: s00000: 1 placeholders, 0 images"):
        write_shards([(replace(sample, images=()), [])], tmp_path, tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
    write_shards([(sample, images)], tmp_path, tokenizer=tokenizer)
    with pytest.raises(UserError, match="already holds 1 shard-"):
        write_shards([(sample, images)], tmp_path, tokenizer=tokenizer)
