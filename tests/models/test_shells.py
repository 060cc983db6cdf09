"""Which stock class a model fits, and that its chat template, names and numbers are those of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from infimed import export
from infimed.contracts import Message, UserError
from infimed.models.parity import draw, to_pillow
from infimed.models.shells import SHELLS, choose
from infimed.models.stock import load_processor, prepare
from infimed.models.vlm import InfiMed
from infimed.processing.chat import render, render_prompt
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parents[2] / "samples" / "tokenizer"


def target(name: str, **options: object) -> dict:
    return {"_target_": f"infimed.{name}", **options}


def model_options(shell: str, *, vision: dict | None = None, projector: dict | None = None, resolution: dict | None = None) -> dict:
    """Describe a model of a few ten thousand parameters that fits a shell, or, with other parts, does not."""
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    language = {"vocab_size": 1400, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    if shell == "llava":
        tower = target("models.vision.SiglipTower", image_size=28, patch_size=7, num_hidden_layers=3, **wide)
        pool = target("models.projector.AveragePoolMLP", in_features=32, out_features=32, visual_grid=4)
        sizes = {"patch_size": 7, "image_size": 28, "visual_grid": 4}
    else:
        tower = target("models.vision.NaflexTower", patch_size=7, num_patches=16, num_hidden_layers=2, **wide)
        pool = target("models.projector.BlockPoolMLP", in_features=32, out_features=32, pool=2, hidden_features=48)
        sizes = {"patch_size": 7, "pool": 2, "min_visual_tokens": 4, "max_visual_tokens": 16}
    return target(
        "models.vlm.InfiMed",
        resolution=target("processing.resolution.Resolution", **(sizes if resolution is None else resolution)),
        vision=tower | (vision or {}),
        projector=pool if projector is None else projector,
        # matrices large enough that answers depend on what is asked
        language=target("models.language.qwen3", **wide | language, initializer_range=0.3),
    )


def build(shell: str, **parts: dict) -> tuple[InfiMed, Tokenizer]:
    tokenizer = Tokenizer.load(TOKENIZER)
    torch.manual_seed(0)
    return instantiate(model_options(shell, **parts), image_token_id=tokenizer.image_id).eval(), tokenizer


@pytest.fixture(scope="module", params=list(SHELLS))
def written(request, tmp_path_factory):
    """A folder as exported, before any proof."""
    model, tokenizer = build(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "out"
    export.write(model, tokenizer, choose(model), stage={"tokenizer": str(TOKENIZER)}, folder=folder, dtype=torch.float32)
    return folder, model.resolution, tokenizer


def projector(name: str, **options: int) -> dict:
    return target(f"models.projector.{name}", in_features=32, out_features=32, **options)


SQUARE = {"patch_size": 7, "image_size": 28}
ANY = {"patch_size": 7, "min_visual_tokens": 4, "max_visual_tokens": 16}


@pytest.mark.parametrize("shell", list(SHELLS))
def test_auto_takes_the_shell_that_is_exact(shell):
    model, _ = build(shell)
    assert choose(model).name == choose(model, shell=shell).name == shell


@pytest.mark.parametrize(
    ("kind", "shell", "parts", "said"),
    [
        (
            "llava",
            "auto",
            {"projector": projector("AveragePoolMLP", visual_grid=3), "resolution": SQUARE | {"visual_grid": 3}},
            "windows that overlap, since 3 does not divide 4, .*train the next stage at resolution.visual_grid=4, the same weights",
        ),
        (
            "llava",
            "auto",
            {"projector": projector("AveragePoolMLP", visual_grid=2), "resolution": SQUARE | {"visual_grid": 2}},
            "over blocks of patches to 2 x 2 tokens; llava has no pooling .*after its final norm.*or train an any-aspect model",
        ),
        (
            "llava",
            "auto",
            {"projector": projector("PerceiverResampler", tokens_per_image=4, heads=2), "resolution": SQUARE | {"visual_grid": 2}},
            "no stock class has a PerceiverResampler",
        ),
        (
            "llava",
            "lfm2_vl",
            {"projector": projector("CAbstractor", visual_grid=2, hidden_features=8), "resolution": SQUARE | {"visual_grid": 2}},
            "no stock class has a CAbstractor",
        ),
        ("llava", "auto", {"vision": {"post_norm": True}}, "before its final norm, this model after it"),
        (
            "llava",
            "auto",
            {"projector": projector("UnshuffleMLP", factor=1, hidden_features=8), "resolution": SQUARE | {"pool": 1}},
            "projector is 32 wide inside, this one 8",
        ),
        (
            "llava",
            "auto",
            {"projector": projector("UnshuffleMLP", factor=1) | {"pre_norm": True}, "resolution": SQUARE | {"pool": 1}},
            "begins with one",
        ),
        ("llava", "lfm2_vl", {}, "this model has SiglipTower and square images: shell=llava may fit"),
        ("lfm2_vl", "llava", {}, "this model has NaflexTower and images of any aspect: shell=lfm2_vl may fit"),
        ("lfm2_vl", "auto", {"vision": {"post_norm": False}}, "train with model.vision.post_norm=true"),
        ("lfm2_vl", "lfm2_vl", {"resolution": SQUARE | {"pool": 2}}, "squeezes it to a square"),
        ("llava", "llama", {}, "shell=llama: expected auto, llava or lfm2_vl"),
    ],
)
def test_a_model_that_no_shell_computes_exactly_is_refused_with_the_way_out(kind, shell, parts, said):
    model, _ = build(kind, **parts)
    with pytest.raises(UserError, match=said):
        choose(model, shell=shell)


TURNS = {
    "text": (Message("user", "What is a lesion?"),),
    "text that begins with a newline": (Message("user", "\nWhat is it?\n"),),
    "system": (Message("system", "Be brief."), Message("user", "What is a lesion?")),
    "image": (Message("user", "<image>\nWhat is shown?"),),
    "images": (Message("user", "Compare <image> and <image>.\nThen look: <image>"),),
    "turns": (
        Message("system", "Be brief."),
        Message("user", "<image>\nWhat is shown?"),
        Message("assistant", " A scan.\n\nOf a head. "),
        Message("user", "And here?\n<image>\n"),
        Message("assistant", "<b>Nothing</b>"),
        Message("user", "Sure?"),
    ),
}


def pictures(messages) -> list[torch.Tensor]:
    sizes = [(40, 30), (25, 61), (33, 33)]
    return [draw(width=w, height=h) for w, h in sizes[: sum(message.text.count("<image>") for message in messages)]]


def visual(messages, resolution: Resolution) -> list[int]:
    return [resolution.tokens_of(picture.shape[2], picture.shape[1]) for picture in pictures(messages)]


def parts_of(messages) -> list[dict]:
    images, turns = map(to_pillow, pictures(messages)), []
    for message in messages:
        first, *rest = message.text.split("<image>")
        parts = [{"type": "text", "text": first}]
        for text in rest:
            parts += [{"type": "image", "image": next(images)}, {"type": "text", "text": text}]
        turns.append({"role": message.role, "content": parts})
    return turns


@pytest.mark.parametrize("messages", TURNS.values(), ids=TURNS.keys())
def test_the_exported_processor_gives_the_token_ids_of_the_training_renderer(written, messages):
    folder, resolution, tokenizer = written
    processor, _ = load_processor(folder, resolution)
    expected = render_prompt(messages, tokenizer, visual_tokens=visual(messages, resolution))
    assert prepare(processor, parts_of(messages))["input_ids"][0].tolist() == expected
    plain = [{"role": message.role, "content": message.text} for message in messages]
    text = processor.apply_chat_template(plain, add_generation_prompt=True)
    images = [to_pillow(picture) for picture in pictures(messages)]
    assert processor(text=[text], images=[images] if images else None)["input_ids"][0] == expected
    if messages[-1].role == "user":
        finished = [*messages, Message("assistant", "Yes.")]
        text = processor.apply_chat_template([*plain, {"role": "assistant", "content": "Yes."}])
        ids = processor(text=[text], images=[images] if images else None)["input_ids"][0]
        assert ids == render(finished, tokenizer, visual_tokens=visual(messages, resolution)).input_ids


def test_images_that_a_list_of_parts_begins_with_have_a_line_each(written):
    folder, resolution, tokenizer = written
    processor, _ = load_processor(folder, resolution)
    images = [to_pillow(draw(width=40, height=30))] * 2
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "Which is older?"}]
    got = prepare(processor, [{"role": "user", "content": parts}])["input_ids"][0].tolist()
    asked = (Message("user", "<image>\n<image>\nWhich is older?"),)
    assert got == render_prompt(asked, tokenizer, visual_tokens=[resolution.tokens_of(40, 30)] * 2)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([{"role": "assistant", "content": "Hello"}], "turn 1 is assistant"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "turn 2 is user"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "turn 2 is system"),
        ([{"role": "tool", "content": "a"}], "turn 1 is tool"),
        ([{"role": "user", "content": [{"type": "video"}]}], "a part of type video"),
        ([{"role": "system", "content": [{"type": "image"}]}], "a system turn holds a part of type image"),
    ],
)
def test_the_template_refuses_what_was_never_trained(written, turns, said):
    folder, resolution, _ = written
    with pytest.raises(Exception, match=said):  # jinja's own error
        load_processor(folder, resolution)[0].apply_chat_template(turns, add_generation_prompt=True)


def test_every_weight_has_the_name_that_vllm_reads():
    names = {shell: SHELLS[shell].weights(build(shell)[0]) for shell in SHELLS}
    for shell, prefixes in {
        "llava": ("vision_tower.vision_model.", "multi_modal_projector.linear_", "language_model.model."),
        "lfm2_vl": ("model.vision_tower.vision_model.", "model.multi_modal_projector.linear_", "model.language_model."),
    }.items():
        assert all(name.startswith(prefixes) for name in names[shell])
        assert {next(p for p in prefixes if name.startswith(p)) for name in names[shell]} == set(prefixes)
        assert not any("lm_head" in name for name in names[shell])  # tied
    assert "model.language_model.embed_tokens.weight" in names["lfm2_vl"]
    assert "language_model.model.embed_tokens.weight" in names["llava"]


def test_an_untied_head_is_written():
    for shell, name in {"llava": "language_model.lm_head.weight", "lfm2_vl": "lm_head.weight"}.items():
        model, _ = build(shell)
        model.language.config.tie_word_embeddings = False
        assert name in SHELLS[shell].weights(model)


def test_the_files_say_what_vllm_and_llama_cpp_look_for(written):
    folder, resolution, tokenizer = written
    config = json.loads((folder / "config.json").read_text())
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert config["text_config"]["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert (images["image_mean"], images["image_std"]) == ([0.5] * 3, [0.5] * 3)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>")]
    if config["model_type"] == "llava":
        assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "full")
        assert config["vision_config"]["num_hidden_layers"] == 2  # of three, the last of which is never read
        assert config["image_token_index"] == tokenizer.image_id
        processor, _ = load_processor(folder, resolution)
        counted = processor._get_num_multimodal_tokens(image_sizes=[(30, 40)])["num_image_tokens"]
        assert counted == [config["image_seq_length"]] == [16]
    else:
        assert config["layer_types"] == ["full_attention"] * 2  # at the top: no hybrid cache
        assert (config["downsample_factor"], config["projector_hidden_size"], config["projector_use_layernorm"]) == (2, 48, False)
        assert config["image_token_id"] == tokenizer.image_id
        assert (images["do_image_splitting"], images["min_tiles"], images["max_tiles"]) == (False, 1, 1)
        assert (images["min_image_tokens"], images["max_image_tokens"], images["encoder_patch_size"]) == (4, 16, 7)


def test_sizes_are_those_of_the_stock_image_processor():
    pytest.importorskip("torchvision")
    from transformers import Lfm2VlImageProcessor

    stock, draws = Lfm2VlImageProcessor(), torch.Generator().manual_seed(0)
    for _ in range(1000):
        width, height = torch.randint(1, 3000, (2,), generator=draws).tolist()
        pool, most = torch.randint(1, 5, (), generator=draws).item(), torch.randint(64, 600, (), generator=draws).item()
        numbers = {"min_image_tokens": 64, "max_image_tokens": most, "encoder_patch_size": 16, "downsample_factor": pool}
        ours = Resolution(patch_size=16, pool=pool, min_visual_tokens=64, max_visual_tokens=most).size(width, height)
        assert stock.smart_resize(height=height, width=width, **numbers) == (ours[1], ours[0])
