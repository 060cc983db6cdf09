"""Chat: `python -m infimed.chat ckpt=PATH [image=PATH] [question="..."]`. Research software, not for clinical use.

Nothing that is typed, shown or answered goes to a disk or a log. Every turn reads the whole conversation anew: an answer's text need not
become the tokens again that it was generated as, so that a cache kept between turns would not hold what training rendered.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from infimed import cli
from infimed.contracts import IMAGE_PLACEHOLDER, DataFault, Images, Message, UserError
from infimed.evaluate import load_model
from infimed.models.generate import generate
from infimed.models.vlm import InfiMed
from infimed.processing.chat import render_prompt
from infimed.processing.dicom import is_dicom, read_image_file
from infimed.processing.image import to_images
from infimed.processing.tokenizer import Tokenizer

HELP = """Type a question, or
  /image PATH [WINDOW] [frame=N]  show one more image; of a DICOM file: a window (lung, bone, ... or CENTRE,WIDTH) and a frame, from 0
  /reset                          forget the conversation and its images
  /help                           say this again
  /quit                           end, as Ctrl-D does; Ctrl-C stops an answer"""

Window = str | tuple[float, ...] | None


def main(config: DictConfig) -> None:
    """Answer one question, or as many as are typed."""
    print("Research software, not for clinical use.", file=sys.stderr)
    if config.ckpt is None:
        raise UserError("ckpt is not set: name a checkpoint, e.g. ckpt=logs/quickstart/latest")
    if not isinstance(config.max_new_tokens, int) or config.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={config.max_new_tokens}: expected at least 1")
    given = [] if config.image is None else list(config.image) if OmegaConf.is_list(config.image) else [config.image]
    paths, window = list(map(str, given)), tuple(config.window) if OmegaConf.is_list(config.window) else config.window
    pictures = read_pictures(paths, window=window, frame=config.frame)
    model, tokenizer, _ = load_model(config.ckpt, device=cli.best_device())
    session = Session(model, tokenizer, max_new_tokens=config.max_new_tokens)
    for path, picture in zip(paths, pictures, strict=True):
        session.show(picture, name=path)
    if config.question is None:
        converse(session)
    else:
        session.ask(str(config.question))


def read_pictures(paths: Sequence[str], *, window: Window = None, frame: int = 0) -> list[torch.Tensor]:
    """Read image files to uint8[3, H, W] each; of several, window and frame are for those that are DICOM. Raises: UserError."""
    if not isinstance(window, str | tuple | None):
        raise UserError(f"window={window}: expected the name of a preset or [centre, width]")
    if not isinstance(frame, int):
        raise UserError(f"frame={frame}: expected a whole number, from 0")
    files = [_bytes_of(path) for path in paths]
    if not any(map(is_dicom, files)) and (window is not None or frame):
        raise UserError("window and frame are for DICOM files, and no image is one: leave them out")
    pictures = []
    for path, data in zip(paths, files, strict=True):
        try:
            pictures.append(read_image_file(data, window=window, frame=frame))
        except DataFault as fault:
            raise UserError(f"image {path}: {fault}") from fault
    return pictures


def _bytes_of(path: str) -> bytes:
    """Read a file. Raises: UserError."""
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # the last two: ~somebody unknown, a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"image {path}: {reason}; expected a PNG, JPEG, TIFF or DICOM file") from error


@dataclass
class Session:
    """One conversation: the model that answers, the turns and their images. A turn that fails leaves no trace."""

    model: InfiMed
    tokenizer: Tokenizer
    max_new_tokens: int
    turns: list[Message] = field(default_factory=list)
    images: list[Images] = field(default_factory=list)
    unasked: int = 0  # the last so many images, which no question has gone with yet

    def reset(self) -> None:
        """Forget turns and images."""
        self.turns, self.images, self.unasked = [], [], 0

    def show(self, picture: torch.Tensor, *, name: str) -> None:
        """Add an image uint8[3, H, W] to the next question. Raises: UserError."""
        try:
            self.images.append(to_images([picture], self.model.resolution))
        except DataFault as fault:
            raise UserError(f"image {name}: {fault}") from fault
        self.unasked += 1
        tokens = self.model.resolution.tokens(self.images[-1].grids[0])
        print(f"image {len(self.images)}: {picture.shape[2]} x {picture.shape[1]} px, {tokens} visual tokens", file=sys.stderr)

    def ask(self, question: str) -> None:
        """Print the answer token by token; what was said before a Ctrl-C is remembered as the answer. Raises: UserError."""
        resolution, stops = self.model.resolution, (self.tokenizer.im_end_id, self.tokenizer.pad_id)
        images = Images.join(self.images, patch_dim=3 * resolution.patch_size**2)
        turns = [*self.turns, Message("user", f"{IMAGE_PLACEHOLDER}\n" * self.unasked + question)]
        try:
            prompt = render_prompt(turns, self.tokenizer, visual_tokens=[resolution.tokens(grid) for grid in images.grids])
        except DataFault as fault:
            raise UserError(f"question: {fault}") from fault
        answer = Spoken(self.tokenizer.decode)
        settings = {"max_new_tokens": self.max_new_tokens, "stop_ids": stops, "pad_id": self.tokenizer.pad_id}
        try:
            generate(self.model, [prompt], [images], on_token=lambda _, token: answer.add(token), **settings)
        except KeyboardInterrupt:
            self._remember(turns, answer.end())
            raise
        self._remember(turns, answer.end())

    def _remember(self, turns: list[Message], answer: str) -> None:
        """Keep a turn that was answered, unless the answer spells a control token: it could not be rendered again."""
        try:
            if self.tokenizer.encode(answer):
                self.turns, self.unasked = [*turns, Message("assistant", answer)], 0
        except DataFault as fault:
            print(f"(not remembered: {fault.detail})", file=sys.stderr)


@dataclass
class Spoken:
    """The text of an answer, printed as its tokens come: a character once all its bytes are there, blank space once something follows."""

    decode: Callable[[Sequence[int]], str]
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def add(self, token: int) -> None:
        """Print what a token adds."""
        self.ids.append(token)
        self._print(self.decode(self.ids).strip().rstrip("\ufffd").rstrip())

    def end(self) -> str:
        """Print what is left and end the line; returns the whole."""
        self._print(self.decode(self.ids).strip())
        print("" if self.text else "(no answer)", flush=True)
        return self.text

    def _print(self, text: str) -> None:
        print(text[len(self.text) :], end="", flush=True)
        self.text = text


def converse(session: Session) -> None:
    """Take questions and commands from the terminal until it ends; a mistake costs one line."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  arrow keys, and earlier lines back for editing
    print(HELP, file=sys.stderr)
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            if (typed := input(prompt).strip()) == "/quit":
                return
            obey(typed, session)
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(stopped; Ctrl-D ends)", file=sys.stderr)
        except (UserError, UnicodeDecodeError) as error:
            print(f"error: {error}", file=sys.stderr)


def obey(typed: str, session: Session) -> None:
    """Put a question, or carry out a command. Raises: UserError."""
    if not typed.startswith("/"):
        return session.ask(typed) if typed else None
    try:
        words = shlex.split(typed)
    except ValueError as error:
        raise UserError(f"{error}: put a path with blanks or quotes in it between quotes") from error
    match words:
        case ["/image", path, *how]:
            (picture,) = read_pictures([path], **dict(map(_option, how)))
            session.show(picture, name=path)
        case ["/reset"]:
            session.reset()
        case ["/help"]:
            print(HELP, file=sys.stderr)
        case _:
            raise UserError(f"{typed} is no command; expected /image PATH [WINDOW] [frame=N], /reset, /help or /quit")
    return None


def _option(word: str) -> tuple[str, Window | int]:
    """Read `lung`, `40,400` or `frame=3`. Raises: UserError."""
    try:
        if word.startswith("frame="):
            return "frame", int(word.removeprefix("frame="))
        return "window", tuple(map(float, word.split(","))) if "," in word else word
    except ValueError as error:
        raise UserError(f"{word}: expected the name of a window, CENTRE,WIDTH or frame=N") from error


if __name__ == "__main__":
    if {"-m", "--multirun"} & set(sys.argv):
        print("error: chat takes no sweep: Hydra would write the question to a file", file=sys.stderr)
        sys.exit(2)
    cli.main(main, "chat")
