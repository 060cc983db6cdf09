"""Qwen3's tokenizer, or a small one of the same make, with the four image tokens in its spare rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from infimed.contracts import IMAGE_PLACEHOLDER, DataFault, UserError

IMAGE_TOKENS = (IMAGE_PLACEHOLDER, "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
"""Appended after a tokenizer's own tokens: rows 151,669 to 151,672 of Qwen3's 151,936, so the embedding is never resized."""

CHAT_VERSION = 2
"""Raise it when chat.py renders any sample differently: token counts stored under the old fingerprint are then stale."""

# Source: tokenizer.json of Qwen3-1.7B (Apache-2.0); the order is the order of the ids, after the byte-pair vocabulary.
QWEN3_SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end"),
        *("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)
QWEN3_ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
QWEN3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # one digit a token
)
THINK_TOKENS = ("<think>", "</think>")
"""Appended too where they are missing, as in SmolLM2's tokenizer; there the embedding needs more rows (`causal_lm(vocab_size=...)`)."""

_REQUIRED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Tokenizer:
    """Text to ids and back; content can never forge a special token."""

    def __init__(self, backend: tokenizers.Tokenizer, *, fingerprint: str) -> None:
        """Wrap `backend`, to which the image tokens are added when it has none; `load` is the usual way in."""
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in IMAGE_TOKENS])
        missing = [token for token in THINK_TOKENS if backend.token_to_id(token) is None]
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in missing])
        self._backend = backend
        self._reserved = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
        self.fingerprint = fingerprint
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())  # rows in use, added tokens included
        self.pad_id = self.id_of("<|endoftext|>")
        self.im_start_id, self.im_end_id = self.id_of("<|im_start|>"), self.id_of("<|im_end|>")
        self.image_id, self.image_start_id, self.image_end_id = (self.id_of(token) for token in IMAGE_TOKENS[:3])
        self.think_id, self.think_end_id = self.id_of("<think>"), self.id_of("</think>")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read `tokenizer.json` (the file, or the folder that holds it). Raises: UserError."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        fix = "give the folder of a Qwen3 tokenizer.json (tools/fetch_tokenizer.py brings it) or samples/tokenizer"
        if not file.is_file():
            raise UserError(f"tokenizer: {file} does not exist, expected a tokenizer.json; {fix}")
        content = file.read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception on a malformed file
            raise UserError(f"tokenizer: {file} is not a tokenizer.json ({error}); {fix}") from error
        if missing := [token for token in _REQUIRED if backend.token_to_id(token) is None]:
            raise UserError(f"tokenizer: {file} lacks {', '.join(missing)}, expected ChatML's special tokens; {fix}")
        return cls(backend, fingerprint=_fingerprint(content))

    def id_of(self, token: str) -> int:
        """Return the id of one token's exact spelling. Raises: KeyError."""
        if (id := self._backend.token_to_id(token)) is None:
            raise KeyError(token)
        return id

    def encode(self, text: str) -> list[int]:
        """Encode content. Raises: DataFault(reserved_token) when it spells a special token, which could forge a turn or an image."""
        ids = self.encode_markup(text)
        if forged := {self._reserved[id] for id in ids if id in self._reserved}:
            raise DataFault("reserved_token", f"the text spells {', '.join(sorted(forged))}; remove it from the sample")
        return ids

    def encode_markup(self, text: str) -> list[int]:
        """Encode our own markup, special tokens recognised; never text from outside. Raises: DataFault(invalid_text)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can carry and UTF-8 cannot
            raise DataFault("invalid_text", f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Turn ids into text; `skip_special` leaves out special tokens (not <think>, which Qwen3 counts as ordinary)."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE of Qwen3's make on `texts`; equal texts in equal order give equal ids.

    vocab_size: rows in all, with the 256 bytes, Qwen3's 26 added tokens and our 4 image tokens; fewer when the texts are too few.
    """
    added = len(QWEN3_SPECIAL) + len(QWEN3_ADDED) + len(IMAGE_TOKENS)
    if vocab_size < 256 + added:
        raise UserError(f"vocab_size={vocab_size}, expected at least {256 + added}: 256 bytes and {added} special tokens")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN3_SPLIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - added, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN3_SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN3_ADDED])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in IMAGE_TOKENS])
    return backend


def _fingerprint(content: bytes) -> str:
    """Name the way in which text becomes ids: 16 hex digits over the file, our added tokens and the chat version."""
    return hashlib.sha256(content + repr((IMAGE_TOKENS, CHAT_VERSION)).encode()).hexdigest()[:16]
