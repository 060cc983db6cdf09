from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from infimed.contracts import Images, UserError
from infimed.models import weights
from infimed.models.attention import PACKED
from infimed.models.language import qwen3
from infimed.models.projector import AveragePoolMLP
from infimed.models.vision import NaflexTower, SiglipTower
from infimed.models.vlm import InfiMed
from infimed.models.weights import check_vocabulary, load_hub_folders, load_state
from infimed.processing.image import normalise
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer
from tests.conftest import ROOT, noise

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 7}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOLERANCE = 1e-6  # float32 on a CPU; worst seen 4.8e-7 (a convolution read as a matrix)
GRIDS = [(4, 4), (4, 4)]


def siglip(**changes):
    return SiglipTower(**{"image_size": 28, **SIZES, **changes})


def naflex(**changes):
    return NaflexTower(**{"num_patches": 16, **SIZES, **changes})


def qwen(**changes):
    return qwen3(**{"vocab_size": 64, "head_dim": 8, **DECODER, **changes})


def llama(**changes):
    config = LlamaConfig(**{"vocab_size": 64, "tie_word_embeddings": True, **DECODER, **changes})
    language = LlamaForCausalLM(config)
    language.set_attn_implementation(PACKED)
    return language


def join(vision=None, language=None) -> InfiMed:
    return InfiMed(
        resolution=Resolution(patch_size=7, image_size=28, visual_grid=2),
        vision=vision or siglip(),
        projector=AveragePoolMLP(in_features=32, out_features=32, visual_grid=2),
        language=language or qwen(),
        image_token_id=60,
    )


def disturb(module):
    """Give constant parameters (norms, biases) values of their own, so that a swapped pair is seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def published_siglip(**vision):
    return disturb(SiglipModel(SiglipConfig(vision_config={"image_size": 28, **SIZES, **vision}, text_config=TEXT)))


def published_naflex():
    return disturb(Siglip2Model(Siglip2Config(vision_config={"num_patches": 16, **SIZES}, text_config=TEXT)))


def save_alone(whole, folder, model_class):
    """Write the vision model alone, as transformers 5 does: no `vision_model.` before the keys."""
    alone = model_class(whole.config.vision_config)
    alone.load_state_dict(whole.vision_model.state_dict())
    alone.save_pretrained(folder)
    assert "embeddings.patch_embedding.weight" in load_file(folder / "model.safetensors")


def save_pair(folder: Path, model: InfiMed) -> tuple[Path, Path]:
    """Write a published SigLIP and the model's decoder, sharded, as save_pretrained does."""
    published_siglip().save_pretrained(folder / "vision")
    disturb(model.language).save_pretrained(folder / "language", max_shard_size="40KB")
    assert (folder / "language" / "model.safetensors.index.json").is_file()
    return folder / "vision", folder / "language"


def load(model, folder, **options):
    load_hub_folders(model, vision=folder / "vision", language=folder / "language", **options)
    return model


def refused(model, folder, **options) -> str:
    with pytest.raises(UserError) as error:
        load(model, folder, **options)
    return str(error.value)


def edit(file: Path, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    (content.get("vision_config") or content).update(changes)
    file.write_text(json.dumps(content))


def pictures(images: Images) -> torch.Tensor:
    """Undo the cutting into patches: float[N, 3, 28, 28]."""
    blocks = normalise(images.patches).reshape(-1, 4, 4, 7, 7, 3)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, 28, 28)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_a_siglip_tower_after_loading_is_the_published_one(tmp_path, alone, feature_layer):
    model, stock = join(siglip(feature_layer=feature_layer, post_norm=feature_layer == -1)), published_siglip().eval()
    save_pair(tmp_path, model)
    if alone:
        save_alone(stock, tmp_path / "vision", SiglipVisionModel)
    else:
        stock.save_pretrained(tmp_path / "vision")
    load(model, tmp_path)
    images = noise(*GRIDS)
    seen = stock.vision_model(pictures(images), output_hidden_states=True)
    expected = seen.last_hidden_state if feature_layer == -1 else seen.hidden_states[-2]
    assert (model.vision.eval()(images) - expected.flatten(0, 1)).abs().max() < TOLERANCE


@pytest.mark.parametrize("alone", [False, True])
def test_a_naflex_tower_after_loading_is_the_published_one(tmp_path, alone):
    model, stock = join(naflex()), published_naflex().eval()
    save_pair(tmp_path, model)
    if alone:
        save_alone(stock, tmp_path / "vision", Siglip2VisionModel)
    else:
        stock.save_pretrained(tmp_path / "vision")
    load(model, tmp_path)
    images = noise(*GRIDS)
    inputs = normalise(images.patches).reshape(2, 16, -1)
    expected = stock.vision_model(inputs, torch.ones(2, 16, dtype=torch.int64), torch.tensor(GRIDS)).last_hidden_state
    assert (model.vision.eval()(images) - expected.flatten(0, 1)).abs().max() < TOLERANCE


def test_a_naflex_tower_takes_a_square_siglip_whose_positions_it_has_room_for(tmp_path):
    model, stock = join(naflex()), published_siglip().eval()
    save_pair(tmp_path, model)
    stock.save_pretrained(tmp_path / "vision")
    load(model, tmp_path)
    images = noise(*GRIDS)
    expected = stock.vision_model(pictures(images)).last_hidden_state
    assert (model.vision.eval()(images) - expected.flatten(0, 1)).abs().max() < TOLERANCE


@pytest.mark.parametrize("with_config", [True, False])
def test_another_number_of_positions_says_which_to_set(tmp_path, with_config):
    model = join(naflex(num_patches=25))
    vision, _ = save_pair(tmp_path, model)
    if not with_config:
        (vision / "config.json").unlink()
    said = refused(model, tmp_path)
    assert ("num_patches: the folder says 16, the model has 25" if with_config else "set model.vision.num_patches=16") in said


def test_blocks_and_norm_that_the_tower_does_not_have_are_not_read(tmp_path):
    model = join(siglip(feature_layer=-3))
    vision, _ = save_pair(tmp_path, model)
    edit(vision / "model.safetensors", lambda state: state["vision_model.encoder.layers.2.mlp.fc1.bias"].fill_(float("nan")))
    edit(vision / "model.safetensors", lambda state: state["vision_model.post_layernorm.weight"].fill_(float("nan")))
    load(model, tmp_path)


@pytest.mark.parametrize("build", [qwen, llama])
def test_a_decoder_after_loading_is_the_published_one_with_its_tie(tmp_path, build):
    source, target = join(language=build()), join(language=build())
    save_pair(tmp_path, source)
    load(target, tmp_path)
    assert target.language.lm_head.weight is target.language.model.embed_tokens.weight
    own = target.language.state_dict()
    assert all(torch.equal(own[name], value) for name, value in source.language.state_dict().items())
    stock = type(target.language).from_pretrained(tmp_path / "language").eval()
    ids = torch.randint(0, 64, (1, 9))
    target.language.set_attn_implementation("sdpa")
    assert (target.language.eval()(ids).logits - stock(ids).logits).abs().max() < TOLERANCE  # worst seen 0


def test_an_untied_head_is_read_and_must_be_there(tmp_path):
    source, target = (join(language=llama(tie_word_embeddings=False)) for _ in range(2))
    _, language = save_pair(tmp_path, source)
    load(target, tmp_path)
    assert torch.equal(target.language.lm_head.weight, source.language.lm_head.weight)
    for file in language.glob("*.safetensors"):
        edit(file, lambda state: state.pop("lm_head.weight", None))
    assert "missing: lm_head.weight [64, 32]" in refused(target, tmp_path)


def test_a_head_stored_beside_its_tied_table_must_be_equal(tmp_path):
    model = join()
    _, language = save_pair(tmp_path, model)
    state = {name: tensor.clone() for name, tensor in model.language.state_dict().items()}  # both names, as Qwen3 is published
    for file in language.glob("model*"):
        file.unlink()
    save_file(state, language / "model.safetensors")
    load(model, tmp_path)
    edit(language / "model.safetensors", lambda state: state["lm_head.weight"].add_(1))
    assert "lm_head.weight is not model.embed_tokens.weight, and the model has one parameter for both" in refused(model, tmp_path)


@pytest.mark.parametrize("tie", [True, False])
def test_a_vocabulary_grows_by_mean_rows_when_it_is_asked_for(tmp_path, tie):
    source, target = (join(language=llama(vocab_size=rows, tie_word_embeddings=tie)) for rows in (64, 70))
    _, language = save_pair(tmp_path, source)
    assert "vocab_size: the folder says 64, the model has 70" in refused(target, tmp_path)
    (language / "config.json").unlink()
    assert "model.embed_tokens.weight is [64, 32], the model has [70, 32]" in refused(target, tmp_path)
    load(target, tmp_path, grow_vocabulary=True)
    for old, new in (
        (getattr(m.language, get)().weight for m in (source, target)) for get in ("get_input_embeddings", "get_output_embeddings")
    ):
        assert torch.equal(new[:64], old)
        assert (new[64:] - old.mean(0)).abs().max() < TOLERANCE  # worst seen 1.5e-8
    too_small = join(language=llama(vocab_size=61, tie_word_embeddings=tie))
    assert "[64, 32], the model has [61, 32]" in refused(too_small, tmp_path, grow_vocabulary=True)


def test_a_folder_of_another_model_lists_every_difference_before_any_tensor_is_read(tmp_path, monkeypatch):
    save_pair(tmp_path, join())
    monkeypatch.setattr(weights, "safe_open", None)
    said = refused(join(siglip(intermediate_size=96, image_size=35), qwen(num_hidden_layers=3, num_attention_heads=8)), tmp_path)
    for line in (
        f"weights.vision: {tmp_path}/vision holds a model of other dimensions; choose the `model=` of this folder",
        "  intermediate_size: the folder says 64, the model has 96",
        "  image_size: the folder says 28, the model has 35",
        f"weights.language: {tmp_path}/language holds a model of other dimensions",
        "  num_hidden_layers: the folder says 2, the model has 3",
        "  num_attention_heads: the folder says 4, the model has 8",
    ):
        assert line in said


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("vision", {"num_attention_heads": 4}, "num_attention_heads: the folder says 4, the model has 2"),
        ("vision", {"hidden_act": "gelu"}, "hidden_act: the folder says gelu, the model has gelu_pytorch_tanh"),
        ("language", {"rope_theta": 5e6, "rope_parameters": None}, "rope_theta: the folder says 5000000.0, the model has 1000000.0"),
        ("language", {"tie_word_embeddings": False}, "tie_word_embeddings: the folder says False, the model has True"),
        ("language", {"model_type": "llama"}, "model_type: the folder says llama, the model has qwen3"),
        ("language", {"model_type": "gpt99"}, "config.json has no model_type that transformers knows ('gpt99')"),
    ],
)
def test_what_tensors_do_not_show_is_compared_too(tmp_path, part, changes, said):
    model = join()
    save_pair(tmp_path, model)
    edit_config(tmp_path / part, **changes)
    assert said in refused(model, tmp_path)


def test_a_folder_of_another_tower_or_with_a_broken_config_is_refused(tmp_path):
    model = join()
    vision, language = save_pair(tmp_path, model)
    (language / "config.json").write_text("{")
    CLIPConfig().save_pretrained(vision)
    said = refused(model, tmp_path)
    assert "vision is a `clip`; expected one of siglip" in said
    assert "config.json is not a model's configuration" in said


def test_a_folder_without_config_loads_when_its_tensors_fit_and_else_names_every_key_of_both_parts(tmp_path):
    source = join()
    for folder in save_pair(tmp_path, source):
        (folder / "config.json").unlink()
    target = load(join(), tmp_path)
    assert torch.equal(target.language.model.norm.weight, source.language.model.norm.weight)
    target = join(siglip(num_hidden_layers=5), qwen(num_hidden_layers=1))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    said = refused(target, tmp_path)
    assert "vision does not fit this model (16 keys)" in said  # a block that the folder lacks
    assert "missing: encoder.layers.3.layer_norm1.bias [32]" in said
    assert "language does not fit this model (11 keys)" in said
    assert "unexpected: model.layers.1.mlp.down_proj.weight [32, 64]" in said
    assert "... and 4 more" in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())  # nothing was copied


def test_missing_files_of_both_parts_are_named_together(tmp_path):
    model = join()
    vision, language = save_pair(tmp_path, model)
    names = sorted(file.name for file in language.glob("*.safetensors"))
    for name in names[1:]:
        (language / name).unlink()
    (vision / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors", "b": "../out.safetensors"}}')
    (tmp_path / "out.safetensors").touch()  # outside of the folder: as good as missing
    said = refused(model, tmp_path)
    assert f"language lacks {', '.join(names[1:])}: expected" in said
    assert "vision lacks ../out.safetensors, model-1.safetensors: expected" in said


@pytest.mark.parametrize("content", ["[1]", "{", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": [1]}}'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    model = join()
    vision, _ = save_pair(tmp_path, model)
    (vision / "model.safetensors.index.json").write_text(content)
    assert "is not a safetensors index" in refused(model, tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    model = join()
    vision, _ = save_pair(tmp_path, model)
    file = vision / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors is not a readable safetensors file" in refused(model, tmp_path)


def test_nan_and_infinity_name_the_tensors_and_the_folders(tmp_path):
    model = join()
    vision, language = save_pair(tmp_path, model)
    edit(vision / "model.safetensors", lambda state: state["vision_model.embeddings.patch_embedding.bias"][3:4].fill_(float("nan")))
    for file in language.glob("*.safetensors"):
        edit(file, lambda state: [tensor.view(-1)[:1].fill_(float("-inf")) for tensor in state.values()])
    said = refused(model, tmp_path).splitlines()
    assert said[:2] == [f"{vision} holds NaN or infinity in 1 tensors; take another copy", "  embeddings.patch_embedding.bias"]
    assert said[2] == f"{language} holds NaN or infinity in 24 tensors; take another copy"
    assert "  model.norm.weight" in said or said[-1] == "  ... and 12 more"
    assert len(said) == 2 + 1 + 12 + 1


def test_a_decoder_of_another_type_takes_the_folder_converted(tmp_path):
    source, target = join(), join().bfloat16()
    save_pair(tmp_path, source)
    load(target, tmp_path)
    for name, tensor in target.language.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, source.language.state_dict()[name].bfloat16())


class Quantised(torch.nn.Linear):
    """A layer whose state holds more than its parameters, as bitsandbytes' do."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.scale"] = torch.ones(1)


def test_values_that_would_be_lost_in_a_quantised_layer_are_refused():
    layer = Quantised(2, 2)
    with pytest.raises(UserError, match=r"cannot be loaded: weight\.scale: made by the layer itself"):
        load_state(layer, layer.state_dict(), origin="somewhere")


def test_constants_that_old_files_hold_are_left_out(tmp_path):
    model = join(language=llama())
    _, language = save_pair(tmp_path, model)
    file = max(language.glob("*.safetensors"))
    edit(file, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(model, tmp_path)


def test_a_model_without_memory_is_the_same_after_loading(tmp_path):
    plain = join(naflex())
    save_pair(tmp_path, plain)
    load(plain, tmp_path)
    with torch.device("meta"):
        light = join(naflex())
    light.language.model.layers[0].requires_grad_(False)
    load(light, tmp_path)
    light.projector = plain.projector  # no folder has it
    assert not any(tensor.is_meta for tensor in (*light.parameters(), *light.buffers()))
    assert light.language.lm_head.weight is light.language.model.embed_tokens.weight
    assert [p.requires_grad for p in light.language.model.layers.parameters()] == [False] * 11 + [True] * 11
    row = torch.randint(0, 60, (1, 12))
    row[0, 2:6] = 60
    where = {"position_ids": torch.arange(12)[None], "cu_seqlens": torch.tensor([0, 12], dtype=torch.int32), "max_seqlen": 12}
    images = noise((4, 4))
    assert torch.equal(light.eval().hidden(row, images, **where), plain.eval().hidden(row, images, **where))


def test_a_tokenizer_of_another_model_or_with_more_rows_than_the_decoder_is_refused(tmp_path):
    model = join()
    tokenizer = Tokenizer.load(ROOT / "samples" / "tokenizer")
    with pytest.raises(UserError, match=rf"uses {tokenizer.vocab_size} vocabulary rows.*language model has 64.*vocab_size=\d+"):
        check_vocabulary(model, tokenizer)
    check_vocabulary(join(language=qwen(vocab_size=tokenizer.vocab_size)), tokenizer)
    _, language = save_pair(tmp_path, model)
    content = json.loads((ROOT / "samples" / "tokenizer" / "tokenizer.json").read_text())
    (language / "tokenizer.json").write_text(json.dumps(content))
    load(model, tmp_path, tokenizer=tokenizer)
    vocabulary = content["model"]["vocab"]
    first, second = (next(token for token, row in vocabulary.items() if row == wanted) for wanted in (40, 41))
    vocabulary[first], vocabulary[second] = 41, 40
    (language / "tokenizer.json").write_text(json.dumps(content))
    said = refused(model, tmp_path, tokenizer=tokenizer)
    assert f"tokenizer: 2 of {tokenizer.vocab_size} tokens are not the rows" in said
    assert f"the first is {second!r} (row 40 there, 41 here); expected tokenizer={language}" in said
