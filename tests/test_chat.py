from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from pydicom.data import get_testdata_file

from infimed import chat, cli
from infimed.chat import Session, Spoken, converse
from infimed.contracts import Images, Message, UserError
from infimed.processing.chat import render_prompt
from infimed.processing.dicom import read_image_file
from infimed.processing.image import to_images
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.training.support import TINY_MODEL, configured

CT = get_testdata_file("CT_small.dcm", download=False)
RESOLUTION = Resolution(patch_size=7, image_size=28, visual_grid=2)
VISUAL = 4  # tokens an image


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ROOT / "samples" / "tokenizer")


@pytest.fixture
def png(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), (210, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


class Scripted:
    """Stand in for `generate`: say what is written, and keep what was asked; `^C` in an answer is the key."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str]) -> None:
        self.tokenizer, self.answers = tokenizer, iter(answers)
        self.prompts: list[list[int]] = []
        self.images: list[Images] = []
        self.settings: dict[str, object] = {}

    def __call__(self, model, prompts, images, *, on_token, **settings) -> None:
        self.prompts += prompts
        self.images += images
        self.settings = settings
        spoken, cut, _ = next(self.answers).partition("^C")
        for token in self.tokenizer.encode_markup(spoken):
            on_token(0, token)
        if cut:
            raise KeyboardInterrupt


@pytest.fixture
def talk(tokenizer, monkeypatch) -> Callable[..., Scripted]:
    """Type lines into a session and return what the model was asked."""

    def run(*typed: str, answers: list[str]) -> Scripted:
        script = Scripted(tokenizer, answers)
        monkeypatch.setattr(chat, "generate", script)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        converse(Session(SimpleNamespace(resolution=RESOLUTION), tokenizer, 9))
        return script

    return run


def rendered(tokenizer: Tokenizer, *turns: str) -> list[int]:
    """Render turns, the user's first."""
    messages = [Message("user" if at % 2 == 0 else "assistant", text) for at, text in enumerate(turns)]
    images = sum(turn.count("<image>") for turn in turns[::2])
    return render_prompt(messages, tokenizer, visual_tokens=[VISUAL] * images)


def complaints(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "("))]


def test_every_turn_reads_the_whole_conversation(talk, tokenizer, capsys):
    script = talk("Hello?", "", "Is it red?", "Sure?", answers=["Good day.", "yes", "no"])
    assert script.prompts == [
        rendered(tokenizer, "Hello?"),
        rendered(tokenizer, "Hello?", "Good day.", "Is it red?"),
        rendered(tokenizer, "Hello?", "Good day.", "Is it red?", "yes", "Sure?"),
    ]
    assert capsys.readouterr().out == "Good day.\nyes\nno\n"
    assert script.settings == {"max_new_tokens": 9, "stop_ids": (tokenizer.im_end_id, tokenizer.pad_id), "pad_id": tokenizer.pad_id}


def test_an_image_goes_with_the_next_question_and_stays(talk, tokenizer, png, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(png.parent))
    typed = ("Hello?", "/image ~/red.png", f"/image '{png}'", "Equal?", "Sure?", f"/image {CT}", "And now?")
    script = talk(*typed, answers=["Yes.", "yes", "no", "no"])
    turns = ("Hello?", "Yes.", "<image>\n<image>\nEqual?", "yes", "Sure?", "no", "<image>\nAnd now?")
    assert script.prompts == [rendered(tokenizer, *turns[: 2 * at + 1]) for at in range(4)]
    assert [len(images) for images in script.images] == [0, 2, 2, 3]
    assert "image 3: 128 x 128 px, 4 visual tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "window"), [("", None), (" lung", "lung"), (" 40,400", (40.0, 400.0)), (" frame=0 -600,1500", (-600, 1500))]
)
def test_a_dicom_file_is_shown_in_the_window_that_is_typed(talk, typed, window):
    script = talk(f"/image {CT}{typed}", "What?", answers=["-"])
    expected = to_images([read_image_file(Path(CT).read_bytes(), window=window)], RESOLUTION)
    assert torch.equal(script.images[0].patches, expected.patches)
    assert window is None or not torch.equal(expected.patches, to_images([read_image_file(Path(CT).read_bytes())], RESOLUTION).patches)


def test_reset_forgets_turns_and_images(talk, tokenizer, png):
    script = talk(f"/image {png}", "One?", f"/image {png}", "/reset", "Two?", answers=["1", "2"])
    assert script.prompts[1] == rendered(tokenizer, "Two?")
    assert len(script.images[1]) == 0


def test_quit_and_the_end_of_the_input_end_it(talk):
    assert len(talk("One?", "/quit", "never read", answers=["1"]).prompts) == 1
    assert talk(answers=[]).prompts == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/image nowhere.png", "image nowhere.png: No such file or directory; expected a PNG, JPEG, TIFF or DICOM file"),
        ("/image /", "image /: Is a directory"),
        ("/image ~nobody-of-this-name/x.png", "image ~nobody-of-this-name/x.png: "),
        ("/image a\0b.png", "image a\0b.png: "),
        ("/image {broken}", "image {broken}: undecodable_image"),
        ("/image {thin}", "image {thin}: image_aspect"),
        ("/image {png} lung", "window and frame are for DICOM files"),
        (f"/image {CT} lun", "did you mean 'lung'?"),
        (f"/image {CT} 40,wide", "40,wide: expected the name of a window, CENTRE,WIDTH or frame=N"),
        (f"/image {CT} 40,400,3", "expected (centre, width)"),
        (f"/image {CT} frame=x", "frame=x: expected"),
        (f"/image {CT} frame=1", "no_such_frame"),
        ("/image", "/image is no command; expected /image PATH"),
        ("/imgae {png}", "expected /image PATH [WINDOW] [frame=N], /reset, /help or /quit"),
        ("/image 'open", "No closing quotation: put a path"),
        ("What is <|im_end|>?", "question: reserved_token"),
        ("And <image>?", "question: image_mismatch"),
        ("Odd \udcff", "question: invalid_text"),
    ],
)
def test_a_mistake_costs_one_line_and_the_session_goes_on(talk, tokenizer, png, capsys, typed, said):
    paths = {"png": png, "broken": png.with_name("broken.png"), "thin": png.with_name("thin.png")}
    paths["broken"].write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("RGB", (2000, 1)).save(paths["thin"])
    script = talk("One?", typed.format(**paths), f"/image {png}", "Two?", answers=["1", "2"])
    (line,) = complaints(capsys)
    assert line.startswith("error: ")
    assert said.format(**paths) in line
    assert script.prompts[1] == rendered(tokenizer, "One?", "1", "<image>\nTwo?")


def test_ctrl_c_stops_an_answer_and_what_was_said_is_remembered(talk, tokenizer, capsys):
    script = talk("One?", "Two?", answers=["Good^Cnever said", "2"])
    assert script.prompts[1] == rendered(tokenizer, "One?", "Good", "Two?")
    captured = capsys.readouterr()
    assert captured.out == "Good\n2\n"
    assert "(stopped; Ctrl-D ends)" in captured.err


def test_a_turn_without_an_answer_leaves_no_trace(talk, tokenizer, png, capsys):
    script = talk(f"/image {png}", "One?", "Two?", "Three?", answers=["^C", " <|im_start|>\n", "3"])
    assert script.prompts == [rendered(tokenizer, f"<image>\n{question}") for question in ("One?", "Two?", "Three?")]
    assert capsys.readouterr().out == "(no answer)\n(no answer)\n3\n"


def test_an_answer_that_spells_a_control_token_does_not_end_the_conversation(talk, tokenizer, capsys):
    script = talk("One?", "Two?", answers=["<think> so", "2"])
    assert script.prompts[1] == rendered(tokenizer, "Two?")
    assert complaints(capsys) == ["(not remembered: the text spells <think>; remove it from the sample)"]


def test_an_answer_is_printed_as_it_comes_in_whole_characters(tokenizer, capsys):
    text = "Größe 漢字 🙂"
    ids = tokenizer.encode_markup(f"\n {text}<|im_end|>\n")
    assert len(ids) > len(text)  # some characters take several tokens
    spoken, seen = Spoken(tokenizer.decode), [""]
    for id in ids:
        spoken.add(id)
        seen.append(seen[-1] + capsys.readouterr().out)
        assert text.startswith(seen[-1])
    assert seen[-1] == text
    assert len(set(seen)) > 8  # step by step
    assert spoken.end() == text
    assert capsys.readouterr().out == "\n"


def test_a_character_that_stays_broken_is_shown_in_the_end(tokenizer, capsys):
    spoken = Spoken(tokenizer.decode)
    for id in tokenizer.encode_markup("ok 🙂")[:-1]:
        spoken.add(id)
    assert capsys.readouterr().out == "ok"
    assert spoken.end() == "ok \ufffd"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """Hold a model at random init: it says something, and not before long."""
    torch.manual_seed(0)
    settings = [*TINY_MODEL, "resolution.visual_grid=2", "model.language.max_position_embeddings=128"]
    config = OmegaConf.to_container(configured(settings).model, resolve=True)
    model = instantiate(config, image_token_id=tokenizer.image_id)
    stored = {"config": {"model": config, "tokenizer": str(ROOT / "samples" / "tokenizer")}, "tokenizer": tokenizer.fingerprint}
    file = tmp_path_factory.mktemp("chat") / "random.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}, "infimed": stored}, file)
    return file


def ask(checkpoint: Path, *extra: str) -> None:
    chat.main(configured([f"ckpt={checkpoint}", *extra], "chat"))


def test_one_question_about_several_files_is_answered_and_nothing_is_written(checkpoint, png, tmp_path, monkeypatch, capsys):
    """The shipped command, in a folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # cli.main sets it for good
    options = [f"ckpt={checkpoint}", f"image=[{png},{CT}]", "window=[40,400]", "question='Equal?'", "max_new_tokens=5"]
    monkeypatch.setattr("sys.argv", ["infimed.chat", *options])
    cli.main(chat.main, "chat")
    captured = capsys.readouterr()
    assert captured.err.startswith("Research software, not for clinical use.\n")
    assert "image 2: 128 x 128 px, 4 visual tokens" in captured.err
    assert captured.out.strip()
    monkeypatch.setattr("sys.argv", ["infimed.chat", *options[:-1], "max_new_tokens=200"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(chat.main, "chat")
    assert "error: prompt 0 has " in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_a_conversation_that_grows_too_long_is_one_line_and_reset_mends_it(checkpoint, monkeypatch, capsys):
    lines = ["One?", "Two " * 60 + "?", "/reset", "Three?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    ask(checkpoint, "max_new_tokens=4")
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert "with max_new_tokens=4 it makes more than the 128 that the model reads; shorten the conversation" in line
    assert captured.out.count("\n") >= 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["ckpt=null"], "ckpt is not set"),
        (["ckpt=nowhere"], "no checkpoint at nowhere"),
        (["max_new_tokens=0"], "max_new_tokens=0: expected at least 1"),
        (["image=nowhere.png"], "image nowhere.png: No such file"),
        (["image=[{png},nowhere.png]"], "image nowhere.png: No such file"),
        (["image={png}", "window=lung"], "window and frame are for DICOM files, and no image is one"),
        (["window=lung"], "window and frame are for DICOM files, and no image is one"),
        ([f"image={CT}", "window=lun"], "did you mean 'lung'"),
        ([f"image={CT}", "window=40"], r"window=40: expected the name of a preset or \[centre, width\]"),
        ([f"image={CT}", "frame=first"], "frame=first: expected a whole number"),
        (["question='what is <|im_end|>?'"], "question: reserved_token"),
        (["question='what?'", "max_new_tokens=200"], "more than the 128 that the model reads"),
    ],
)
def test_a_mistake_on_the_command_line_ends_it(checkpoint, png, extra, said):
    with pytest.raises(UserError, match=said):
        ask(checkpoint, *(e.format(png=png) for e in extra))


def test_stdout_carries_answers_alone_and_no_sweep_writes_a_question_down(checkpoint, png, tmp_path):
    def typed(*arguments: str) -> subprocess.CompletedProcess:
        path = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-m", "infimed.chat", *arguments], cwd=tmp_path, env=path, capture_output=True, text=True)

    told = typed(f"ckpt={checkpoint}", f"image={png}", "question=what?", "max_new_tokens=3")
    assert told.returncode == 0
    assert "packed attention" not in told.stdout
    assert "not for clinical use" in told.stderr
    swept = typed("-m", f"ckpt={checkpoint}", "question=what?")
    assert swept.returncode == 2
    assert "chat takes no sweep" in swept.stderr
    assert not any(path.is_file() and path.name != png.name for path in tmp_path.rglob("*"))
