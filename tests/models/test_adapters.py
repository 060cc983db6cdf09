"""Adapters: they start as nothing, learn alone, fold back into a plain model; four-bit bases survive a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from infimed.contracts import UserError
from infimed.models.adapters import add_adapters, is_adapter, merge_adapters, plain_name
from infimed.models.language import qwen3

pytest.importorskip("peft", reason="pip install 'infimed[lora]'")

ATTENTION = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
TOLERANCE = 1e-5  # after a merge; worst seen 1.3e-6 on logits up to 2.6, float32


class Tiny(nn.Module):
    """The three components, joined as plainly as can be."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        self.vision = SiglipVisionModel(
            SiglipVisionConfig(image_size=14, patch_size=7, num_hidden_layers=2, vision_use_head=False, **sizes)
        )
        self.projector = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.language = qwen3(vocab_size=64, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, initializer_range=0.1, **sizes)
        if not tied:
            self.language.lm_head.weight = nn.Parameter(self.language.lm_head.weight.detach().clone())

    def forward(self, ids_T: torch.Tensor, pixels_N3HW: torch.Tensor) -> torch.Tensor:
        visual = self.projector(self.vision(pixels_N3HW).last_hidden_state).flatten(0, 1)
        row = torch.cat([visual, self.language.get_input_embeddings()(ids_T)]).unsqueeze(0)
        cu = torch.tensor([0, len(visual), row.shape[1]], dtype=torch.int32)
        positions = torch.cat([torch.arange(len(visual)), torch.arange(len(ids_T))]).unsqueeze(0)
        hidden = self.language.model(
            inputs_embeds=row, position_ids=positions, use_cache=False, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=9, max_length_k=9
        ).last_hidden_state
        return self.language.get_output_embeddings()(hidden)[0]


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 64, (9,)), torch.randn(2, 3, 14, 14)


@pytest.fixture
def make() -> Callable[..., Tiny]:
    """Build the same model each time."""

    def make_tiny(**options: bool) -> Tiny:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return Tiny(**options).eval()

    return make_tiny


def train(model: nn.Module, inputs: tuple, steps: int = 3) -> None:
    """Move the adapters away from zero by a few optimizer steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).logsumexp(-1).sum().backward()
        optimizer.step()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def everywhere(**options: object) -> Mapping[str, Mapping]:
    return {
        "vision": {**ATTENTION, **options},
        "projector": {"rank": 2, "alpha": 2, "targets": r"[02]", **options},
        "language": {**ATTENTION, "targets": r"model\.layers\.1\..*", **options},
    }


@torch.no_grad()
def test_fresh_adapters_leave_every_logit_as_it_was(make, inputs):
    model = make()
    before = model(*inputs)
    add_adapters(model, everywhere())
    assert torch.equal(model(*inputs), before)


def test_only_the_adapters_of_adapted_components_learn_and_the_others_stay_as_they_were(make, inputs):
    model = make()
    model.vision.requires_grad_(False)
    before = tensors(model)
    reports = add_adapters(model, {"language": ATTENTION})
    assert [r.component for r in reports] == ["language"]
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in model.named_parameters() if is_adapter(n) or n.startswith("projector.")}
    assert reports[0].trainable == sum(p.numel() for n, p in model.named_parameters() if is_adapter(n)) == 4 * (64 + 64 + 64 + 32) * 2
    assert reports[0].base == 2 * (64 * 64 + 64 * 32)
    train(model, inputs)
    after = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if name.startswith("projector.")}


@torch.no_grad()
def test_dropout_of_adapters_is_off_in_a_model_that_was_being_evaluated(make, inputs):
    model = make()
    add_adapters(model, everywhere(dropout=0.5))
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.normal_()
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["self_attn.o_proj"], ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")),
        (["model.layers.1.mlp.up_proj"], ("model.layers.1.mlp.up_proj",)),
        (r"model\.layers\.0\.mlp\..*", tuple(f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down"))),
    ],
)
def test_patterns_mean_whole_names_or_last_parts_and_nothing_else(make, targets, modules):
    model = make()
    (report,) = add_adapters(model, {"language": {"rank": 1, "alpha": 1, "targets": targets}})
    assert report.modules == modules
    assert {n.partition(".lora_A")[0] for n, _ in model.language.named_parameters() if ".lora_A" in n} == set(modules)


@pytest.mark.parametrize("training", [True, False])
def test_merging_keeps_the_logits_and_gives_back_the_plain_models_names_and_classes(make, inputs, training):
    model, plain = make().train(training), make()
    add_adapters(model, everywhere())
    train(model, inputs)
    with torch.no_grad():
        before = model(*inputs)
        fates = merge_adapters(model)
        assert (model(*inputs) - before).abs().max() < TOLERANCE
        assert (plain(*inputs) - before).abs().max() > 0.1
    state = plain.state_dict()
    assert model.state_dict().keys() == state.keys() == fates.keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert {m.training for m in model.modules()} == {training}
    assert not any("peft_config" in vars(m) for m in model.modules())
    make().load_state_dict(model.state_dict(), strict=True)
    targets = {f"vision.encoder.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "qv"}
    targets |= {name.replace("vision.", "vision.vision_model.", 1) for name in targets}  # transformers before 5.x has a level more
    targets |= {"projector.0.weight", "projector.2.weight"}
    targets |= {f"language.model.layers.1.self_attn.{n}_proj.weight" for n in "qkvo"}
    targets |= {f"language.model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert {name for name, fate in fates.items() if fate == "changed"} == targets & state.keys()
    assert set(fates.values()) == {"changed", "unchanged"}
    assert all(torch.equal(model.state_dict()[name], state[name]) == (fate == "unchanged") for name, fate in fates.items())
    assert model.language.lm_head.weight is model.language.model.embed_tokens.weight


def test_merging_untrained_adapters_changes_nothing_and_says_so(make):
    model, plain = make(), make()
    add_adapters(model, everywhere())
    assert set(merge_adapters(model).values()) == {"unchanged"}
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_merging_bf16_sums_in_float32_and_rounds_once(make):
    model = make().to(torch.bfloat16)
    add_adapters(model, {"projector": {"rank": 2, "alpha": 4, "targets": ["0"]}})
    layer = model.projector[0]
    assert layer.lora_B["default"].weight.dtype == torch.bfloat16
    nn.init.normal_(layer.lora_B["default"].weight)
    up, down = layer.lora_B["default"].weight.float(), layer.lora_A["default"].weight.float()
    exact = (layer.base_layer.weight.float() + 2 * up @ down).to(torch.bfloat16)
    twice = layer.base_layer.weight + (2 * up @ down).to(torch.bfloat16)
    assert not torch.equal(exact, twice)
    merge_adapters(model)
    assert torch.equal(model.projector[0].weight, exact)


def test_merging_an_adapter_with_nan_is_refused_before_anything_is_touched(make, inputs):
    model = make()
    add_adapters(model, everywhere())
    train(model, inputs, steps=1)
    before = tensors(model)
    with torch.no_grad():
        model.projector[2].lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"1 adapter matrices hold NaN or infinity, projector\.2\.lora_B"):
        merge_adapters(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if n != "projector.2.lora_B.default.weight")


def test_a_checkpoint_of_an_adapted_model_loads_strictly_into_one_built_in_the_same_order(make, inputs, tmp_path):
    model, again = make(), make()
    add_adapters(model, everywhere())
    train(model, inputs)
    torch.save(model.state_dict(), tmp_path / "adapted.ckpt")
    add_adapters(again, everywhere())
    again.load_state_dict(torch.load(tmp_path / "adapted.ckpt", weights_only=True), strict=True)
    assert torch.equal(again(*inputs), model(*inputs))


def test_plain_names_of_an_adapted_model_are_those_of_the_plain_model(make):
    model, plain = make(), make()
    add_adapters(model, everywhere())
    names = [plain_name(name) for name in model.state_dict()]
    assert {name for name in names if name} == plain.state_dict().keys()
    assert names.count(None) == sum(map(is_adapter, model.state_dict())) > 0


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"decoder": ATTENTION}, "names `decoder`; expected one of vision, projector, language"),
        (
            {"language": {**ATTENTION, "targets": ["q_porj"]}},
            r"`q_porj` matches no module; near names: .*model\.layers\.\*\.self_attn\.q_proj",
        ),
        ({"language": {**ATTENTION, "targets": r"layers\.0"}}, r"matches no module; near names: "),
        ({"language": {**ATTENTION, "targets": "q_proj("}}, "not a regular expression"),
        ({"language": {**ATTENTION, "targets": []}}, "matches no module"),
        ({"language": {**ATTENTION, "targets": ["embed_tokens"]}}, "embed_tokens, of type Embedding; only linear layers"),
        ({"language": {**ATTENTION, "targets": ["lm_head"]}}, r"lm_head is tied to model\.embed_tokens: it cannot be adapted"),
        ({"language": {**ATTENTION, "targets": ".*"}}, "lm_head is tied"),
        ({"language": {"rank": 0, "alpha": -1, "targets": ["q_proj"], "dropout": 1}}, "rank is 0.*alpha is -1.*dropout is 1"),
        ({"language": {**ATTENTION, "quantise": "int8"}}, "quantise is 'int8'; expected nf4"),
        ({"language": {"rank": 2, "r": 2}}, "language.r is unknown.*alpha is missing.*targets is missing"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected_and_the_model_is_left_alone(make, adapters, message):
    model = make()
    with pytest.raises(UserError, match=message):
        add_adapters(model, {**adapters, "vision": ATTENTION})
    assert model.state_dict().keys() == make().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_rows_that_four_bit_blocks_do_not_divide_are_refused(make):
    model = make()
    model.projector[2] = nn.Linear(96, 64)
    with pytest.raises(UserError, match=r"projector\.quantise: 2 has rows of 96, no multiple of 64"):
        add_adapters(model, {"projector": {"rank": 2, "alpha": 2, "targets": ["0", "2"], "quantise": "nf4"}})


def test_an_untied_head_is_refused_too_since_the_loss_reads_its_matrix(make):
    with pytest.raises(UserError, match="lm_head is the output head"):
        add_adapters(make(tied=False), {"language": {**ATTENTION, "targets": ["lm_head"]}})


def test_adding_twice_or_before_the_weights_are_there_is_refused(make):
    model = make()
    add_adapters(model, {"language": ATTENTION})
    with pytest.raises(UserError, match="has adapters already"):
        add_adapters(model, {"language": ATTENTION})
    with torch.device("meta"):
        unloaded = Tiny()
    with pytest.raises(UserError, match="has no values yet"):
        add_adapters(unloaded, {"language": ATTENTION})


@pytest.mark.parametrize(("package", "extra", "quantise"), [("peft", "lora", None), ("bitsandbytes", "qlora", "nf4")])
def test_an_absent_package_is_a_user_error_with_the_command_that_installs_it(make, monkeypatch, package, extra, quantise):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"need the package {package} .*pip install 'infimed\[{extra}\]'"):
        add_adapters(make(), everywhere(quantise=quantise))


def test_no_adapters_need_no_package(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = make()
    assert add_adapters(model, {}) == ()
    assert set(merge_adapters(model).values()) == {"unchanged"}


def quantised(make: Callable[..., Tiny]) -> Tiny:
    pytest.importorskip("bitsandbytes", reason="pip install 'infimed[qlora]'")
    model = make()
    add_adapters(model, everywhere(quantise="nf4"))
    return model


def test_a_four_bit_base_is_half_a_byte_a_weight_near_the_model_and_its_adapters_alone_learn(make, inputs):
    model, plain, rounded = quantised(make), make(), quantised(make)
    fates = merge_adapters(rounded)
    matrices = [name for name, fate in fates.items() if fate == "quantised"]
    errors = [(rounded.state_dict()[n] - plain.state_dict()[n]).norm() / plain.state_dict()[n].norm() for n in matrices]
    assert len(errors) == 4 + 2 + 7
    assert max(errors) < 0.11  # relative, root mean square; worst seen 0.093
    assert min(errors) > 0.05
    assert model.projector[0].base_layer.weight.dtype == torch.uint8
    assert model.projector[0].base_layer.weight.numel() == 64 * 128 / 2
    losses = [model(*inputs).logsumexp(-1).mean().item()]
    train(model, inputs, steps=5)
    losses.append(model(*inputs).logsumexp(-1).mean().item())
    assert losses[1] < losses[0]
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if is_adapter(n))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters() if is_adapter(n)}


def test_a_four_bit_checkpoint_goes_through_a_file_into_a_model_of_other_base_weights(make, inputs, tmp_path):
    model, other = quantised(make), Tiny().eval()
    train(model, inputs)
    torch.save(model.state_dict(), tmp_path / "adapted.ckpt")
    state = torch.load(tmp_path / "adapted.ckpt", weights_only=True)
    add_adapters(other, everywhere(quantise="nf4"))
    assert not torch.equal(other(*inputs), model(*inputs))
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(*inputs), model(*inputs))
    back = other.state_dict()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_four_bit_values_without_their_scales_are_missing_keys_and_not_a_silent_mixture(make):
    model = quantised(make)
    state = {name: value for name, value in model.state_dict().items() if ".weight." not in name or is_adapter(name)}
    with pytest.raises(RuntimeError, match=r"Missing key.*projector\.0\.base_layer\.weight\.absmax"):
        model.load_state_dict(state, strict=True)


def test_evaluation_computes_exactly_what_training_computed_on_a_four_bit_base(make, inputs):
    model = quantised(make).train()
    training = model(*inputs)
    before = tensors(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(*inputs), training)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merging_a_four_bit_base_gives_the_plain_model_that_was_trained(make, inputs):
    model, plain = quantised(make), make()
    train(model, inputs)
    with torch.no_grad():
        before = model(*inputs)
        fates = merge_adapters(model)
        assert (model(*inputs) - before).abs().max() < TOLERANCE
    assert model.state_dict().keys() == plain.state_dict().keys() == fates.keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, plain.state_dict()[name])}
    assert same == {name for name, fate in fates.items() if fate == "unchanged"}
    assert fates["projector.0.weight"] == "quantised"
    assert fates["projector.0.bias"] == fates["language.model.layers.0.mlp.up_proj.weight"] == "unchanged"


def test_a_four_bit_bias_keeps_its_type_and_value_under_mixed_precision(make, inputs):
    model, plain = quantised(make), make()
    with torch.autocast("cpu", torch.bfloat16):
        model.projector[0](torch.ones(1, 64, dtype=torch.bfloat16))
        model(*inputs)
    assert torch.equal(model.projector[0].base_layer.bias, plain.projector[0].bias)
    assert model.projector[0].base_layer.bias.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantise", [None, "nf4"])
def test_adapters_on_a_gpu_train_and_merge(make, inputs, quantise):
    model = make().to("cuda")
    inputs = tuple(x.to("cuda") for x in inputs)
    add_adapters(model, everywhere(quantise=quantise))
    train(model, inputs)
    with torch.no_grad():
        before = model(*inputs)
        merge_adapters(model)
        assert (model(*inputs) - before).abs().max() < 1e-3  # not measured
    assert model.state_dict().keys() == make().state_dict().keys()
