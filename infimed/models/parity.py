"""Does an exported folder compute what the trained model computes? Prompts, pixels, features, logits and greedy answers of both, compared.

One model is in memory at a time: first ours answers every case (`answer`), then the stock class, loaded from the files, does (`prove`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from infimed.contracts import IMAGE_PLACEHOLDER, Message, UserError, borders, bucket
from infimed.models.attention import attention
from infimed.models.stock import load_auto_processor, load_processor, load_stock, pixels_of, prepare
from infimed.models.vlm import InfiMed
from infimed.processing.chat import render_prompt
from infimed.processing.image import normalise, to_images
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

NEW_TOKENS = 32
LOGITS_AT = 64
"""Logits are compared at this many last tokens: they depend on all before them, and those of a whole long prompt would fill gigabytes."""

# Pixels are absolute, in a range of 2; features and logits a share of their largest value. Measured on random models of 27 + 28 blocks:
# float32 at most 1.3e-6. Two ways of computing in bfloat16 are each about as far from float32 as the other, hence twice what ours is;
# measured, they were 1.1 times apart at most. A few roundings (2 ** -8 each) are added for values that ours happens to hit.
PIXELS = 1e-6
FLOAT32 = 1e-4
BFLOAT16_ROUNDING, BFLOAT16_SPARE = 2.0, 4 * 2**-8
GREY_LEVEL = 1 / 127.5 + PIXELS
"""One step of 256: torchvision's resize, which stock processors prefer, rounds a few values in a thousand the other way than Pillow's."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A conversation up to the answer, and its pictures."""

    name: str
    messages: tuple[Message, ...]
    pictures: tuple[torch.Tensor, ...] = ()  # uint8[3, H, W] each

    @property
    def files(self) -> list[str]:
        """Name the pictures' files inside the exported folder."""
        return [f"parity/{self.name}_{number}.png" for number in range(len(self.pictures))]

    def conversation(self, images: Iterable[object]) -> list[dict[str, object]]:
        """Write the turns as stock processors take them: parts of type text, and of type image with one of `images` each."""
        images = iter(images)
        turns = []
        for message in self.messages:
            text, *rest = message.text.split(IMAGE_PLACEHOLDER)
            parts = [{"type": "text", "text": text}] if text else []
            for after in rest:
                parts.append({"type": "image", "image": next(images)})
                parts += [{"type": "text", "text": after}] if after else []
            turns.append({"role": message.role, "content": parts})
        return turns


@dataclass(frozen=True)
class Seen:
    """What a model makes of a case; everything in float32, whatever it was computed in."""

    input_ids: list[int]
    pixels: torch.Tensor  # [P, patch_size ** 2 * 3], normalised
    features: torch.Tensor  # [V, D], projected
    logits: torch.Tensor  # [LOGITS_AT or fewer, vocabulary]
    greedy: list[int]  # NEW_TOKENS ids, stop tokens forbidden


Answers = Mapping[str, Mapping[str, Seen]]
"""By type of the weights (`DTYPES`), then by case."""


def cases() -> tuple[Case, ...]:
    """Draw the fixtures: no image, one, and several in several turns; the pictures differ in size and shape."""
    wide, tall = draw(width=203, height=151), draw(width=90, height=217)
    system = Message("system", "You describe medical images. Research use only.")
    first = Message("user", "<image>\nWhich imaging method is this?")
    return (
        Case("text_only", (system, Message("user", "Name two uses of contrast agents.\nBe brief."))),
        Case("one_image", (first,), (wide,)),
        Case(
            "several_images_and_turns",
            (system, first, Message("assistant", "A drawing."), Message("user", "Compare <image> with the first.\n<image>")),
            (wide, tall, wide),
        ),
    )


def draw(*, width: int, height: int) -> torch.Tensor:
    """Draw a picture with slopes, a sharp disc and a fine grating: uint8[3, height, width]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    red, green, blue = x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 7 * 42
    disc = (x - width // 3) ** 2 + (y - height // 2) ** 2 < (min(width, height) // 4) ** 2
    return torch.stack([torch.where(disc, 255 - colour, colour) for colour in (red, green, blue)]).to(torch.uint8)


def to_pillow(picture: torch.Tensor) -> Image.Image:
    """Turn uint8[3, H, W] into a Pillow image."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def save_pictures(folder: Path) -> None:
    """Write the fixtures' pictures, so that any other program can be asked the same."""
    (folder / "parity").mkdir()
    for case in cases():
        for picture, file in zip(case.pictures, case.files, strict=True):
            to_pillow(picture).save(folder / file)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the type of the weights in place; buffers, such as RoPE's frequencies, keep theirs, as they do in stock models."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def answer(model: InfiMed, tokenizer: Tokenizer) -> Answers:
    """Put every case to our model in every type; leaves its weights in the last one."""
    answers = {}
    for name, dtype in DTYPES.items():
        cast(model, dtype)
        answers[name] = {case.name: ask_ours(model, tokenizer, case) for case in cases()}
    return answers


def prove(folder: Path, answers: Answers, resolution: Resolution) -> dict[str, object]:
    """Load an exported folder as a stock user does, put every case to it, and report how far it is from our model's answers.

    Raises:
        UserError: naming every quantity that is beyond its limit.
    """
    processor, processor_name = load_processor(folder, resolution)
    report = {
        case.name: {"messages": case.conversation(case.files), "prompt_ids": answers["float32"][case.name].input_ids, "greedy": {}}
        for case in cases()
    }
    problems = []
    for name, dtype in DTYPES.items():
        model = load_stock(folder, dtype)
        architecture = type(model).__name__
        for case in cases():
            stock = ask_stock(model, processor, case)
            measured, said = compare(answers[name][case.name], stock, float32=answers["float32"][case.name])
            problems += [f"case {case.name}, {name}: {line}" for line in said]
            report[case.name][name] = measured
            report[case.name]["greedy"][name] = stock.greedy
        del model
    auto, said = check_auto_processor(folder, answers["float32"], resolution)
    if problems := problems + said:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise UserError(f"the exported model is not the one that was trained, so nothing was kept; please report this:\n{listed}")
    return {
        "passed": True,
        "architecture": architecture,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "processor": {"compared": processor_name, "auto": auto},
        "cases": report,
        "files": digests(folder),
    }


@torch.inference_mode()
def ask_ours(model: InfiMed, tokenizer: Tokenizer, case: Case) -> Seen:
    """Put a case to our model."""
    images = to_images(case.pictures, model.resolution)
    ids = render_prompt(case.messages, tokenizer, visual_tokens=[model.resolution.tokens(grid) for grid in images.grids])
    row = torch.tensor([ids])
    where = {"position_ids": torch.arange(len(ids))[None], "cu_seqlens": borders([len(ids)]), "max_seqlen": bucket(len(ids))}
    hidden_BTD = model.hidden(row, images, **where)[:, -LOGITS_AT:]
    embeds_BTD = model.embed(row, images)
    with attention(model.language, "sdpa"):
        greedy = model.language.generate(
            inputs_embeds=embeds_BTD,
            attention_mask=torch.ones_like(row),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=[tokenizer.im_end_id, tokenizer.pad_id],
            pad_token_id=tokenizer.pad_id,
        )
    features = model.see(images).float() if len(images) else torch.zeros(0, model.projector.out_features)
    logits = model.language.get_output_embeddings()(hidden_BTD)[0].float()
    return Seen(ids, normalise(images.patches), features, logits, greedy[0].tolist())


@torch.inference_mode()
def ask_stock(model: PreTrainedModel, processor: ProcessorMixin, case: Case) -> Seen:
    """Put a case to a stock model through its chat template and processor."""
    inputs = prepare(processor, case.conversation(map(to_pillow, case.pictures)))
    visual = {key: value for key, value in inputs.items() if key in ("pixel_values", "spatial_shapes", "pixel_attention_mask")}
    features = torch.zeros(0, model.config.text_config.hidden_size)
    if case.pictures:
        features = torch.cat(list(model.get_image_features(**visual, return_dict=True).pooler_output)).float()
    logits = model(**inputs, logits_to_keep=LOGITS_AT).logits[0].float()
    greedy = model.generate(**inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = inputs["input_ids"][0].tolist()
    return Seen(ids, pixels_of(inputs, model.config.vision_config.patch_size), features, logits, greedy[0, len(ids) :].tolist())


def compare(ours: Seen, stock: Seen, *, float32: Seen) -> tuple[dict[str, object], list[str]]:
    """Measure how far two models are apart on a case, and name what is beyond its limit.

    Token ids must be equal; so must greedy answers in float32. In bfloat16 a near tie may fall the other way: how many first tokens are
    equal is reported.

    Args:
        float32: what ours makes of the case in float32; the same as `ours` when that is it.
    """
    measured: dict[str, object] = {}
    problems = []
    for what in ("pixels", "features", "logits"):
        mine, theirs = getattr(ours, what), getattr(stock, what)
        scale = float(mine.abs().max()) if what != "pixels" and mine.numel() else 1.0
        rounding = distance(mine, getattr(float32, what)) / scale
        limit = PIXELS if what == "pixels" else FLOAT32 if ours is float32 else BFLOAT16_ROUNDING * rounding + BFLOAT16_SPARE
        measured[what] = {"apart": distance(mine, theirs) / scale, "limit": limit}
        if not measured[what]["apart"] <= limit:  # a NaN is beyond every limit
            problems.append(f"{what} {measured[what]['apart']:.2e} apart, limit {limit:.2e}")
    parted = [i for i, (left, right) in enumerate(zip(ours.greedy, stock.greedy, strict=True)) if left != right]
    measured["greedy_tokens_equal"] = parted[0] if parted else NEW_TOKENS
    if ours.input_ids != stock.input_ids:
        problems.append(f"other token ids: {len(ours.input_ids)} ours, {len(stock.input_ids)} of the stock processor")
    if ours is float32 and parted:
        problems.append(f"the greedy answers part at token {parted[0]} of {NEW_TOKENS}")
    return measured, problems


def check_auto_processor(folder: Path, seen: Mapping[str, Seen], resolution: Resolution) -> tuple[dict[str, object], list[str]]:
    """Compare the processor that a stock user gets with the cases' prompts, which must be equal, and their pixels, see `GREY_LEVEL`."""
    processor = load_auto_processor(folder, resolution)
    if processor is None:
        return {"run": False, "why": "torchvision is not installed, and Lfm2VlImageProcessor needs it"}, []
    largest, mean, problems = 0.0, 0.0, []
    for case in cases():
        inputs = prepare(processor, case.conversation(map(to_pillow, case.pictures)))
        if inputs["input_ids"][0].tolist() != seen[case.name].input_ids:
            problems.append(f"case {case.name}: AutoProcessor gives other token ids than the training renderer")
            continue
        mine, theirs = seen[case.name].pixels, pixels_of(inputs, resolution.patch_size)
        largest = max(largest, distance(mine, theirs))
        mean = max(mean, float((mine - theirs).abs().mean())) if case.pictures else mean
    if not mean <= GREY_LEVEL:
        problems.append(f"AutoProcessor's pixels are {mean:.2e} from those of training in the mean, limit {GREY_LEVEL:.2e}, a grey level")
    name = type(processor.image_processor).__name__
    return {"run": True, "image_processor": name, "pixels": {"apart": largest, "mean": mean, "limit_of_mean": GREY_LEVEL}}, problems


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest difference; infinite for other shapes, 0 for nothing."""
    if left.shape != right.shape:
        return float("inf")
    return float((left - right).abs().max()) if left.numel() else 0.0


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file, by its name inside the folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
