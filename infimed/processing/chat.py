"""The only renderer of conversations, for training and inference: Qwen3's ChatML with thinking off, and the loss mask.

Every answer follows the empty think block that Qwen3's template puts before the one being generated. The template takes it away again
from earlier answers of a conversation; we do not: an answer that was learned without the block would never be asked for that way, and a
conversation would stop being a prefix of its continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from infimed.contracts import IGNORE_INDEX, IMAGE_PLACEHOLDER, DataFault, Message
from infimed.processing.tokenizer import Tokenizer

_ANSI = {"learned": "\x1b[32m", "given": "\x1b[90m", "image": "\x1b[36m"}  # green, grey, cyan
_ANSI_END = "\x1b[0m"


@dataclass(frozen=True)
class Rendered:
    """A conversation as numbers."""

    input_ids: list[int]  # L tokens
    labels: list[int]  # L; the token itself where it is learned from, else IGNORE_INDEX


@dataclass(frozen=True)
class _Piece:
    ids: list[int]
    learned: bool = False


# What is learned: the model reads system, questions and images as given, and is asked for the answers alone.
# Every assistant answer counts, also the earlier ones of a conversation, each followed by <|im_end|>: that is how it learns to stop.
# The role header and the empty think block are given, as they are at inference; so is the "\n" between turns, which nobody generates.
# The first token (<|im_start|>) is never learned, hence no loss crosses from one sample of a pack into the next.
def render(messages: Sequence[Message], tokenizer: Tokenizer, *, visual_tokens: Sequence[int]) -> Rendered:
    """Render a finished conversation with its labels.

    visual_tokens: tokens that each image takes, in the order of the placeholders.
    Raises: DataFault(bad_turns, empty_answer, image_mismatch, reserved_token).
    """
    _check_turns(messages, last="assistant")
    pieces = list(_pieces(messages, tokenizer, visual_tokens))
    assert not pieces[0].learned
    input_ids = [id for piece in pieces for id in piece.ids]
    labels = [id if piece.learned else IGNORE_INDEX for piece in pieces for id in piece.ids]
    return Rendered(input_ids, labels)


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer, *, visual_tokens: Sequence[int]) -> list[int]:
    """Render a conversation up to the place where the answer begins; a prefix of `render` of the same with an answer.

    Raises: DataFault(bad_turns, empty_answer, image_mismatch, reserved_token).
    """
    _check_turns(messages, last="user")
    prompt = [id for piece in _pieces(messages, tokenizer, visual_tokens) for id in piece.ids]
    return [*prompt, *_assistant_header(tokenizer)]


@dataclass(frozen=True)
class TextSize:
    """What an index keeps of a conversation: with the tokens of its images, length and place of everything follow."""

    tokens: int  # of `render` without its visual tokens: the true length is this plus sum(visual_tokens)
    image_at: tuple[int, ...]  # for each image the tokens before its run, the image start token included, visual ones of other images not


def measure_text(messages: Sequence[Message], tokenizer: Tokenizer) -> TextSize:
    """Measure a conversation with no visual token at all. Raises: DataFault as `render`."""
    ids = render(messages, tokenizer, visual_tokens=[1] * _placeholders(messages)).input_ids
    places = [place for place, id in enumerate(ids) if id == tokenizer.image_id]
    return TextSize(len(ids) - len(places), tuple(place - before for before, place in enumerate(places)))


def count_tokens(messages: Sequence[Message], tokenizer: Tokenizer) -> int:
    """Count the tokens of `render` without its visual tokens: the true length is this plus sum(visual_tokens)."""
    return measure_text(messages, tokenizer).tokens


def visualise(rendered: Rendered, tokenizer: Tokenizer) -> str:
    """Colour a rendered conversation for a terminal: green is learned, grey is given, cyan stands for an image's tokens."""

    def kind(pair: tuple[int, int]) -> str:
        return "image" if pair[0] == tokenizer.image_id else "given" if pair[1] == IGNORE_INDEX else "learned"

    parts = []
    for name, run in groupby(zip(rendered.input_ids, rendered.labels, strict=True), key=kind):
        ids = [id for id, _ in run]
        text = f"{IMAGE_PLACEHOLDER}x{len(ids)}" if name == "image" else tokenizer.decode(ids, skip_special=False)
        parts.append(f"{_ANSI[name]}{text}{_ANSI_END}")
    return "".join(parts)


def _check_turns(messages: Sequence[Message], *, last: str) -> None:
    """Raise DataFault(bad_turns) unless the turns are [system] user assistant user ... and end with `last`."""
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(spoken))]
    if not spoken or spoken != expected or spoken[-1] != last:
        raise DataFault("bad_turns", f"turns are {roles}, expected an optional system, then user and assistant in turn, the last {last}")


def _placeholders(messages: Sequence[Message]) -> int:
    """Count the image placeholders, which stand in user turns only; elsewhere the spelling is a forged token."""
    return sum(message.text.count(IMAGE_PLACEHOLDER) for message in messages if message.role == "user")


def _pieces(messages: Sequence[Message], tokenizer: Tokenizer, visual_tokens: Sequence[int]) -> Iterator[_Piece]:
    """Yield the conversation cut where learning starts and stops; the tokens are those of the whole text tokenised at once."""
    if (placeholders := _placeholders(messages)) != len(visual_tokens):
        raise DataFault("image_mismatch", f"{placeholders} {IMAGE_PLACEHOLDER} placeholders in the text, {len(visual_tokens)} images")
    counts = iter(visual_tokens)
    newline = tokenizer.encode("\n")
    for index, message in enumerate(messages):
        if message.role == "assistant":
            # Blank space around an answer is dropped: the border of prompt and answer then is a token border with every text.
            if not (answer := message.text.strip()):
                raise DataFault("empty_answer", f"message {index} is an empty answer; give it a text or drop the sample")
            yield _Piece(_assistant_header(tokenizer))
            yield _Piece([*tokenizer.encode(answer), tokenizer.im_end_id], learned=True)
        else:
            yield _Piece([tokenizer.im_start_id, *_given_turn(message, tokenizer, counts), tokenizer.im_end_id])
        yield _Piece(newline)


def _given_turn(message: Message, tokenizer: Tokenizer, counts: Iterator[int]) -> list[int]:
    """Encode role and text of a turn that is not learned, every placeholder widened to its image's run of tokens."""
    parts = message.text.split(IMAGE_PLACEHOLDER) if message.role == "user" else [message.text]
    ids = tokenizer.encode(f"{message.role}\n{parts[0]}")  # together: a text that starts with a newline shares a token with the header's
    for part in parts[1:]:
        ids += [tokenizer.image_start_id, *[tokenizer.image_id] * next(counts), tokenizer.image_end_id, *tokenizer.encode(part)]
    return ids


def _assistant_header(tokenizer: Tokenizer) -> list[int]:
    """Open an assistant turn as Qwen3's generation prompt does with enable_thinking=False."""
    blank = tokenizer.encode("\n\n")
    return [tokenizer.im_start_id, *tokenizer.encode("assistant\n"), tokenizer.think_id, *blank, tokenizer.think_end_id, *blank]
