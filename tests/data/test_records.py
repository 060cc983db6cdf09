"""Records: ours are checked field by field, those of others become ours in one place."""

import json

import pytest
from sample_factory import make_sample, png

from infimed.contracts import DataFault, Message, UserError
from infimed.data.record_files import read_records
from infimed.data.records import convert, extension_of, ignored, images_of, key_of, read_member, sample_from_json, sample_to_json

TURNS = [{"role": "user", "text": "<image>which?"}, {"role": "assistant", "text": "axial"}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer_type": "essay"}, "answer_type 'essay' is none of"),
        ({"answer_type": ["open"]}, "answer_type is not text"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"surprise": "x"}, "unknown field 'surprise'"),
        ({"key": "x"}, "unknown field 'key'"),
        ({"organ": 3}, "organ is not text"),
        ({"organ": None}, "organ is not text"),
        ({"messages": []}, "messages is not a list"),
        ({"messages": "hello"}, "messages is not a list"),
        ({"messages": [{"role": "robot", "text": "x"}]}, "role 'robot'"),
        ({"messages": [{"role": "user", "text": 1}]}, r"messages\[0\] is not"),
        ({"messages": [{"role": "user", "text": "x", "more": 1}]}, r"messages\[0\] is not"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is not"),
        ({"images": "0.png"}, "images is not a list"),
        ({"choices": [1]}, "choices is not a list"),
    ],
)
def test_a_wrong_field_is_a_schema_fault_that_names_it(change, said):
    record = json.loads(sample_to_json(make_sample(0)[0])) | change
    with pytest.raises(DataFault, match=said) as fault:
        sample_from_json("k", json.dumps(record).encode())
    assert fault.value.reason == "schema"


@pytest.mark.parametrize("data", [b"{", b"[1]", b"[" * 200_000, b"\xff", b"null"])
def test_bytes_that_are_no_record_are_a_schema_fault(data):
    with pytest.raises(DataFault, match="schema"):
        sample_from_json("k", data)


def test_a_sample_survives_being_written_and_read():
    sample, _ = make_sample(4, images=2)
    assert sample_from_json(sample.key, sample_to_json(sample)) == sample


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"messages": json.dumps(TURNS)},
        {"conversations": [{"from": "human", "value": "<image>which?"}, {"from": "gpt", "value": "axial"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]}, TURNS[1] | {"text": "axial"}]},
    ],
)
def test_every_spelling_of_a_conversation_becomes_the_same_sample(record):
    sample = convert("k", {**record, "task": "plane", "width": 7}, images=("jpg",), layout={"source": "s", "licence": "CC0-1.0"})
    assert sample.messages == (Message("user", "<image>which?"), Message("assistant", "axial"))
    assert (sample.key, sample.images, sample.source, sample.licence, sample.task) == ("k", ("jpg",), "s", "CC0-1.0", "plane")


def test_what_shows_no_place_for_its_images_shows_them_first():
    asked = convert("k", {"question": "How many?", "answer": 3, "choices": "3; 4"}, images=("0.jpg", "1.jpg"), layout={})
    assert asked.messages == (Message("user", "<image><image>\nHow many?"), Message("assistant", "3"))
    assert asked.choices == ("3", "4")
    told = convert("k", {"caption": "a chest"}, images=("0.jpg",), layout={"prompt": "Say it."})
    assert (told.messages[0].text, told.messages[1].text, told.answer_type) == ("<image>\nSay it.", "a chest", "caption")
    assert convert("k", {"caption": "a chest"}, images=(), layout={}).messages[0].text == "Describe the image."


def test_what_a_record_says_itself_counts_more_than_the_default_and_nothing_said_less():
    record = {"caption": "x", "source": "mine", "licence": "", "organ": None}
    sample = convert("k", record, images=(), layout={"source": "s", "licence": "MIT"})
    assert (sample.source, sample.licence, sample.organ) == ("mine", "MIT", "unknown")
    assert ignored({"caption": "x", "sha256": "..", "width": 3}) == ["sha256", "width"]


@pytest.mark.parametrize("record", [{}, {"question": "?"}, {"messages": "no"}, {"messages": [1]}, [], {"caption": "x", "task": [3]}])
def test_a_record_without_a_conversation_is_a_schema_fault(record):
    with pytest.raises(DataFault, match="schema"):
        convert("k", record, images=(), layout={})


def test_a_caption_is_read_from_its_text_and_must_be_utf8():
    assert read_member("k", "txt", b" a chest \n", images=("jpg",), layout={}).messages[1].text == "a chest"
    with pytest.raises(DataFault, match="schema: k: the caption is not UTF-8"):
        read_member("k", "txt", b"\xff", images=(), layout={})


def test_keys_and_images_are_found_under_their_names():
    assert [key_of(record, otherwise="7") for record in ({"id": "x/7.b"}, {"id": 0}, {}, {"key": "../.."})] == ["x_7_b", "0", "7", "7"]
    named = [images_of(r) for r in ({"image": "a;b"}, {"images": ["a", "b"]}, {"images": '["a"]'}, {"image": b"\0"}, {"image": None}, {})]
    assert named == [["a", "b"], ["a", "b"], ["a"], [b"\0"], [], []]
    kinds = [extension_of(data) for data in (png(0), b"\xff\xd8\xff\xe0", b"\0" * 128 + b"DICM", b"RIFF....WEBP", b"hello")]
    assert kinds == ["png", "jpg", "dcm", "webp", "bin"]


def test_a_long_json_list_is_read_without_being_held(tmp_path):
    records = [{"id": n, "text": "x" * (n % 3000)} for n in range(3000)]  # 4.5 MB, several chunks
    (tmp_path / "a.json").write_text("\ufeff " + json.dumps(records, indent=1))
    found = read_records(tmp_path / "a.json")
    assert next(found) == records[0]
    assert list(found) == records[1:]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[{}, {]", "record 1 is not JSON"),
        ("a.json", "[{} {}]", "record 0 is not JSON .*expected , or ]"),
        ("a.json", "[{}", "record 0 is not JSON"),
        ("a.json", "[{}] {}", "something follows the list"),
        ("a.jsonl", "{}\n{oops", "line 2 is not JSON"),
        ("a.csv", "question,answer\nhow,many,more\n", "line 2 has not as many values"),
        ("a.csv", 'question,answer\n"how,many\n', "is not CSV"),
        ("a.parquet", "PAR1", "is not a sound parquet file"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(tmp_path, name, text, said):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        list(read_records(tmp_path / name))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'infimed\[tables\]'"):
        list(read_records(tmp_path / "a.parquet"))
