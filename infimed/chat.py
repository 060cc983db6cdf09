"""Chat: `python -m infimed.chat image=PATH ckpt=PATH [question="..."]`. Research software, not for clinical use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from infimed import cli
from infimed.contracts import DataFault, Message, UserError
from infimed.data.encode import no_pixels
from infimed.evaluate import load_model
from infimed.models.generate import generate
from infimed.processing.chat import render_prompt
from infimed.processing.dicom import is_dicom, read_image_file
from infimed.processing.image import num_visual_tokens, resize_square


def main(config: DictConfig) -> None:
    """Answer one question, or as many as are typed."""
    if config.ckpt is None:
        raise UserError("ckpt is not set: name a checkpoint, e.g. ckpt=logs/quickstart/latest")
    if not isinstance(config.max_new_tokens, int) or config.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={config.max_new_tokens}: expected at least 1")
    pictures = read_picture(config)
    model, tokenizer, _ = load_model(config.ckpt)
    pixels = torch.stack([resize_square(p, model.image_size) for p in pictures]) if pictures else no_pixels(model.image_size)
    history: list[Message] = []
    for question in questions(config.question):
        history.append(Message("user", ("<image>\n" * len(pictures) if not history else "") + question))
        try:
            prompt = render_prompt(history, tokenizer, visual_tokens=[num_visual_tokens(model.visual_grid)] * len(pictures))
        except DataFault as fault:
            raise UserError(f"question: {fault}") from fault
        stops = (tokenizer.im_end_id, tokenizer.pad_id)
        (ids,) = generate(model, [prompt], [pixels], max_new_tokens=config.max_new_tokens, stop_ids=stops, pad_id=tokenizer.pad_id)
        history.append(Message("assistant", tokenizer.decode(ids).strip() or "(no answer)"))
        print(history[-1].text, flush=True)


def read_picture(config: DictConfig) -> list[torch.Tensor]:
    """Read the image file, if one is named: [uint8[3, H, W]] or []."""
    if config.image is None:
        return []
    path = Path(config.image)
    if not path.is_file():
        raise UserError(f"image={path} does not exist: expected a PNG, JPEG, TIFF or DICOM file")
    window = tuple(config.window) if OmegaConf.is_list(config.window) else config.window
    if not isinstance(window, str | tuple | None):
        raise UserError(f"window={window}: expected the name of a preset or [centre, width]")
    data = path.read_bytes()
    if not is_dicom(data) and (window is not None or config.frame):
        raise UserError(f"image={path} is no DICOM file: window and frame say nothing about it; leave them out")
    try:
        return [read_image_file(data, window=window, frame=config.frame)]
    except DataFault as fault:
        raise UserError(f"image={path}: {fault}") from fault


def questions(given: str | None) -> Iterator[str]:
    """Yield the one question given, or what is typed until an empty line or the end."""
    if given is not None:
        yield given
        return
    while True:
        try:
            typed = input("question (empty to stop): ").strip()
        except EOFError:
            return
        if not typed:
            return
        yield typed


if __name__ == "__main__":
    cli.main(main, "chat")
