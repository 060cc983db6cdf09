"""Packed attention: every kernel against a dense block-diagonal reference, tracing, choice of kernel, refusals."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from infimed.contracts import UserError
from infimed.models import attention as ours
from infimed.models import kernels
from infimed.models.attention import KERNELS, PACKED, implementation, packed_attention, resolve
from infimed.models.kernels import Segments, block_mask

LENGTHS = (11, 7, 1, 16, 16)  # a single token, and neighbours of one length, which SDPA takes as one batch
SHAPES = {"mha": (4, 4, 8), "gqa": (4, 2, 8), "one_kv": (6, 1, 16), "tower": (2, 2, 72)}  # heads, key-value heads, width
TOLERANCE = 5e-6  # float32 against float64; worst seen 8.7e-7 for outputs, 1.4e-6 for gradients
CPU, HALF = torch.device("cpu"), torch.bfloat16
GPU = torch.device("cuda", 0)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def borders(lengths: tuple[int, ...], *, slots: int = 0) -> torch.Tensor:
    """Give int32[1 + segments]; `slots` appends empty segments up to that number."""
    ends = torch.tensor(lengths).cumsum(0)
    return torch.cat([torch.zeros(1), ends, ends[-1:].expand(max(0, slots - len(lengths)))]).int()


def make_qkv(shape: str, lengths: tuple[int, ...] = LENGTHS, **options: object) -> list[torch.Tensor]:
    heads, kv_heads, width = SHAPES[shape]
    tokens = sum(lengths)
    # Views of [1, T, heads, D], as the models hand them over.
    return [torch.randn(1, tokens, h, width, **options).transpose(1, 2).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def attend(
    qkv: list[torch.Tensor], *, causal: bool, kernel: str = "sdpa", cu: torch.Tensor | None = None, longest: int = 16, **options: object
):
    cu = borders(LENGTHS) if cu is None else cu
    return packed_attention(nn.Module(), *qkv, None, cu_seq_lens_q=cu, max_length_q=longest, is_causal=causal, kernel=kernel, **options)[0]


def dense(qkv: list[torch.Tensor], *, causal: bool, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    """Softmax over a T x T block-diagonal mask, in the dtype of the inputs; [1, T, heads, D]."""
    query, key, value = (x[0] for x in qkv)
    key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
    allowed = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().to(query.device)
    allowed = allowed.tril() if causal else allowed
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).unsqueeze(0)


def worst(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.fixture(params=["sdpa", "traced_sdpa", "flex"])
def kernel(request, monkeypatch) -> str:
    """Every kernel of a CPU; `traced_sdpa` is the operator that stands for the loop wherever code is traced."""
    if request.param == "traced_sdpa":
        plain = kernels.Segments
        monkeypatch.setitem(
            KERNELS, "sdpa", ours.Kernel(lambda q, k, v, segments: ours._packed_sdpa(q, k, v, *plain(*segments)), half_only=False)
        )
        monkeypatch.setattr(ours, "resolve", lambda *_, **__: "sdpa")
    return request.param.removeprefix("traced_")


# --- equality with a dense reference


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("kernel", "shape"),
    [(k, s) for k in ("sdpa", "traced_sdpa", "flex") for s in SHAPES if k != "flex" or s in ("gqa", "tower")],  # flex is slow to start
    indirect=["kernel"],
)
def test_outputs_equal_dense_block_diagonal_attention(kernel, shape, causal):
    qkv = [x.detach() for x in make_qkv(shape)]
    expected = dense([x.double() for x in qkv], causal=causal)
    assert worst([attend(qkv, causal=causal, kernel=kernel)], [expected]) < TOLERANCE
    padded = attend(qkv, causal=causal, kernel=kernel, cu=borders(LENGTHS, slots=8), longest=32)
    assert torch.equal(padded, attend(qkv, causal=causal, kernel=kernel)), "empty segments or a loose bound changed something"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", ["sdpa", "traced_sdpa"], indirect=True)  # flex attention has no backward on a CPU
def test_gradients_equal_those_of_dense_block_diagonal_attention(kernel, shape, causal):
    qkv = make_qkv(shape)
    double = [x.detach().double().requires_grad_() for x in qkv]
    weight = torch.randn(1, sum(LENGTHS), SHAPES[shape][0], SHAPES[shape][2])
    cu = borders(LENGTHS, slots=8)
    found = torch.autograd.grad((attend(qkv, causal=causal, kernel=kernel, cu=cu) * weight).sum(), qkv)
    assert worst(found, torch.autograd.grad((dense(double, causal=causal) * weight).sum(), double)) < TOLERANCE


def test_changing_one_segment_leaves_the_others_bit_for_bit(kernel):
    qkv = [x.detach() for x in make_qkv("gqa")]
    other = [torch.cat([x[:, :, :11], torch.randn_like(x[:, :, 11:18]), x[:, :, 18:]], dim=2) for x in qkv]
    changed = (attend(qkv, causal=True, kernel=kernel) != attend(other, causal=True, kernel=kernel)).flatten(2).any(-1)[0]
    assert changed[11:18].all() and not changed[:11].any() and not changed[18:].any()
    stock = [F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True).transpose(1, 2) for x in (qkv, other)]
    assert (stock[0] != stock[1]).flatten(2).any(-1)[0, 18:].all(), "the control: plain causal attention does leak"


def test_the_scale_is_the_one_given(kernel):
    query, key, value = (x.detach() for x in make_qkv("gqa"))
    expected = attend([query * 0.5 * 8**0.5, key, value], causal=True, kernel=kernel)
    assert worst([attend([query, key, value], causal=True, kernel=kernel, scaling=0.5)], [expected]) < TOLERANCE


@pytest.mark.parametrize("causal", [True, False])
def test_flex_tiles_hold_exactly_the_pairs_that_may_attend(causal):
    lengths = (100, 60, 128, 1, 450, 51)  # segments over two tiles, one that fills whole tiles, a short last tile
    tokens = sum(lengths)
    mask = block_mask(borders(lengths, slots=8), tokens, causal=causal)
    pad = -tokens % kernels.BLOCK
    allowed = F.pad(torch.block_diag(*(torch.ones(n, n) for n in lengths)), (0, pad, 0, pad))
    tiles = (allowed.tril() if causal else allowed).unfold(0, kernels.BLOCK, kernels.BLOCK).unfold(1, kernels.BLOCK, kernels.BLOCK)
    listed = {}
    for name in ("kv", "full_kv"):
        counts, columns = getattr(mask, f"{name}_num_blocks")[0, 0], getattr(mask, f"{name}_indices")[0, 0]
        listed[name] = {(row, int(c)) for row, n in enumerate(counts) for c in columns[row, :n]}
    everything = {(int(i), int(j)) for i, j in tiles.flatten(2).amax(2).nonzero()}
    assert listed["full_kv"] == {(int(i), int(j)) for i, j in tiles.flatten(2).amin(2).nonzero()} and listed["full_kv"]
    assert listed["kv"] | listed["full_kv"] == everything and not listed["kv"] & listed["full_kv"]


def test_flex_builds_its_mask_once_for_all_layers_and_anew_for_another_pack():
    cu = borders(LENGTHS)
    first = kernels._cached_block_mask(cu, 51, True)
    assert kernels._cached_block_mask(cu, 51, True) is first
    assert kernels._cached_block_mask(cu, 51, False) is not first
    assert kernels._cached_block_mask(borders(LENGTHS), 51, False) is not kernels._cached_block_mask(cu, 51, False)
    before = kernels._cached_block_mask(cu, 51, False)
    cu[1] = 5
    assert kernels._cached_block_mask(cu, 51, False) is not before, "a static buffer that was written to"
    with torch.inference_mode():  # its tensors have no version to look at
        kernels._cached_block_mask(borders(LENGTHS), 51, True)


# --- kernels that need a GPU, as far as a CPU can tell


def flash2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
):
    return ours._packed_sdpa(q, k, v, cu_seqlens_q, max_seqlen_q, causal, softmax_scale)


def flash3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False
):
    return flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal)


def flash4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, causal=False):
    return flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal), None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "stand_in"), [("flash2", flash2), ("flash3", flash3), ("flash4", flash4)])
def test_flash_attention_is_called_by_the_signature_of_each_version(monkeypatch, name, stand_in, causal):
    package = ModuleType(KERNELS[name].module)
    package.flash_attn_varlen_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, KERNELS[name].module, package)
    query, key, value = (x.detach()[0].transpose(0, 1) for x in make_qkv("gqa"))
    torch._dynamo.reset()
    for run in (KERNELS[name].run, torch.compile(KERNELS[name].run, backend="eager", fullgraph=True)):
        found = run(query, key, value, Segments(borders(LENGTHS), 16, causal, 0.3))
        assert torch.equal(found, ours._packed_sdpa(query, key, value, borders(LENGTHS), 16, causal, 0.3))


@pytest.mark.parametrize("takes_gqa", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_gets_its_window_and_repeated_heads_where_torch_has_no_flag_for_them(monkeypatch, takes_gqa, causal):
    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, **flags):
        assert flags == ({"enable_gqa": True} if takes_gqa else {}) and (takes_gqa or q.shape == k.shape)
        return ours._segment_loop(q, k, v, cu_q, max_q, {(-1, 0): True, (-1, -1): False}[window_size], scale)

    monkeypatch.setattr(kernels, "varlen_attn", stand_in)
    monkeypatch.setattr(kernels, "VARLEN_TAKES_GQA", takes_gqa)
    qkv = [x.detach() for x in make_qkv("gqa")]
    found = kernels.varlen(*(x[0].transpose(0, 1) for x in qkv), Segments(borders(LENGTHS), 16, causal, None))
    assert worst([found[None]], [dense([x.double() for x in qkv], causal=causal)]) < TOLERANCE


def test_torchs_own_varlen_accepts_our_call_eager_and_traced_on_the_meta_device():
    query, key, value = (x.to("meta", HALF)[0].transpose(0, 1).detach().requires_grad_() for x in make_qkv("gqa"))
    torch._dynamo.reset()
    for run in (kernels.varlen, torch.compile(kernels.varlen, backend="eager", fullgraph=True)):
        out = run(query, key, value, Segments(borders(LENGTHS).to("meta"), 16, True, None))
        gradients = torch.autograd.grad(out.sum(), (query, key, value))
        assert out.shape == query.shape and [g.shape for g in gradients] == [x.shape for x in (query, key, value)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", ["gqa", "tower"])
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "sdpa"])
def test_gpu_kernels_equal_dense_attention_without_a_wait_for_the_device(name, shape, causal):
    if reason := ours._obstacle(name, GPU, HALF):
        pytest.skip(reason)
    lengths = (100, 60, 128, 1, 300, 51)
    qkv = make_qkv(shape, lengths, device=GPU, dtype=HALF)
    double = [x.detach().double().requires_grad_() for x in qkv]
    cu = borders(lengths, slots=8).to(GPU)
    weight = torch.randn(1, sum(lengths), SHAPES[shape][0], SHAPES[shape][2], device=GPU, dtype=HALF)

    def both(out: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return out, *torch.autograd.grad((out * weight).sum(), inputs)

    attend(qkv, causal=causal, kernel=name, cu=cu, longest=512).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = both(attend(qkv, causal=causal, kernel=name, cu=cu, longest=512), qkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, plain = both(dense(double, causal=causal, lengths=lengths), double), both(dense(qkv, causal=causal, lengths=lengths), qkv)
    for ours_, same_dtype, exact in zip(found, plain, expected, strict=True):  # not measured: no GPU at hand
        assert worst([ours_], [exact]) <= 2 * worst([same_dtype], [exact]) + 1e-3


# --- tracing


class Attend(nn.Module):
    """A decoder's attention without its projections."""

    is_causal = True

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **where: object) -> torch.Tensor:
        return packed_attention(self, query, key, value, None, **where)[0]


PACKS = [(40, 24), (8,) * 8, (10, 20, 34), (64,), (1, 63), (30, 30, 2, 1, 1), (33, 31)]


def where(lengths: tuple[int, ...], *, bucketed: bool) -> dict:
    if not bucketed:
        return {"cu_seq_lens_q": borders(lengths), "max_length_q": max(lengths)}
    return {"cu_seq_lens_q": borders(lengths, slots=8), "max_length_q": 1 << (max(lengths) - 1).bit_length()}


def frames_by_pack(*, bucketed: bool, kernel: str = "sdpa", **options: object) -> list[int]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(Attend(), backend=counter, fullgraph=True, **options)  # fullgraph: a graph break raises
    frames = []
    for lengths in PACKS:
        qkv = [x.detach() for x in make_qkv("gqa", lengths)]
        found = compiled(*qkv, **where(lengths, bucketed=bucketed), kernel=kernel)
        assert worst([found], [dense([x.double() for x in qkv], causal=True, lengths=lengths)]) < TOLERANCE
        frames.append(counter.frame_count)
    return frames


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_seven_packs_compile_two_graphs_at_most_and_none_after_the_second_pack(name):
    frames = frames_by_pack(bucketed=True, kernel=name)
    assert frames[1] <= 2 and frames[-1] == frames[1]


def test_unbucketed_static_shapes_recompile_for_each_pack_so_that_the_count_above_means_something():
    assert frames_by_pack(bucketed=False, dynamic=False)[-1] >= 6


def test_a_qwen3_layer_compiles_whole_and_its_gradients_are_those_of_eager():
    torch._dynamo.reset()
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1
    )
    config._attn_implementation = PACKED
    layer, rope = Qwen3DecoderLayer(config, 0), Qwen3RotaryEmbedding(config)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for lengths in PACKS:
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        inputs = {"position_embeddings": rope(torch.zeros(1), positions), **where(lengths, bucketed=True)}
        hidden = torch.randn(1, 64, 32, requires_grad=True)
        results = []
        for run in (layer, compiled):
            out = run(hidden, **inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), (hidden, *layer.parameters()))))
        assert worst(*results) < TOLERANCE  # worst seen 0
    assert counter.frame_count == 2


def test_the_operator_keeps_torchs_contract_for_tracing():
    inputs = [x[0].transpose(0, 1).detach().requires_grad_() for x in make_qkv("gqa")]
    torch.library.opcheck(ours._packed_sdpa, (*inputs, borders(LENGTHS, slots=8), 16, True, None))


def test_forward_and_backward_run_on_meta_and_on_fake_tensors():
    qkv = [x.to("meta").detach().requires_grad_() for x in make_qkv("gqa")]
    for name in KERNELS:
        out = attend(qkv, causal=True, kernel=name, cu=borders(LENGTHS).to("meta"))
        assert out.shape == (1, 51, 4, 8)
        assert [g.shape for g in torch.autograd.grad(out.sum(), qkv)] == [x.shape for x in qkv]
    with FakeTensorMode():
        assert attend(make_qkv("gqa"), causal=True, cu=torch.zeros(6, dtype=torch.int32)).shape == (1, 51, 4, 8)


def test_the_flop_counter_sees_the_operator():
    query, key, value = (x[0].transpose(0, 1) for x in make_qkv("gqa"))
    for device, pairs in (("cpu", sum(n * n for n in LENGTHS)), ("meta", sum(LENGTHS) ** 2)):
        inputs = [x.detach().to(device).requires_grad_(device == "meta") for x in (query, key, value)]
        with FlopCounterMode(display=False) as counter:
            out = ours._packed_sdpa(*inputs, borders(LENGTHS).to(device), 16, True, None)
            assert counter.get_total_flops() == 4 * 4 * 8 * pairs  # two products, 4 heads of 8
    with counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 4 * 8 * pairs


# --- choice


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """A GPU as far as the choice of a kernel sees one."""
    found = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: found.capability)
    ours._resolve.cache_clear()
    yield found
    ours._resolve.cache_clear()


def test_auto_takes_varlen_on_a_gpu_in_half_precision_and_sdpa_elsewhere(gpu):
    assert resolve("auto", GPU, torch.bfloat16) == resolve("auto", GPU, torch.float16) == "varlen"
    assert {resolve("auto", GPU, torch.float32), resolve("auto", CPU, HALF), resolve("auto", torch.device("meta"), HALF)} == {"sdpa"}


def test_auto_takes_sdpa_on_a_gpu_too_old_for_varlen(gpu):
    gpu.capability = (7, 5)
    assert resolve("auto", GPU, HALF) == "sdpa"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "capability", "reason"),
    [
        ("varlen", CPU, HALF, (9, 0), "attention=varlen cannot run on cpu .*: it runs on cuda. attention=auto"),
        ("varlen", GPU, torch.float32, (9, 0), "bfloat16 and float16 alone; set trainer.precision"),
        ("flash3", GPU, HALF, (8, 0), "compute capability 9.0, this GPU has 8.0"),
        ("flash2", GPU, HALF, (9, 0), "No module named 'flash_attn'; pip install flash-attn"),
        ("flash4", GPU, HALF, (9, 0), "pip install --pre flash-attn-4"),
        ("flash5", GPU, HALF, (9, 0), "unknown; choose auto, sdpa, varlen, flash2"),
    ],
)
def test_a_kernel_that_cannot_run_says_why_and_what_to_do(gpu, monkeypatch, name, device, dtype, capability, reason):
    for package in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    if name == "flash2":
        monkeypatch.delitem(sys.modules, "flash_attn")
        monkeypatch.setattr(sys, "path", [])
    gpu.capability = capability
    with pytest.raises(UserError, match=reason):
        resolve(name, device, dtype)


def test_the_choice_is_logged_once_and_not_for_each_call(caplog):
    ours._resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="infimed"):
        for _ in range(3):
            attend(make_qkv("gqa"), causal=True, kernel="auto")
        attend(make_qkv("gqa", dtype=torch.float64), causal=True, kernel="auto")
    assert [record.getMessage() for record in caplog.records] == [
        f"packed attention: sdpa on cpu, torch.float{bits} (not varlen: it runs on cuda)" for bits in (32, 64)
    ]


def test_transformers_takes_every_implementation_for_decoder_and_tower_without_looking_for_a_package():
    decoder = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    )
    tower = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    )
    for name in ("auto", *KERNELS):
        for model in (decoder, tower):
            model.set_attn_implementation(implementation(name))
            assert model.config._attn_implementation == implementation(name)


def test_a_config_s_kernel_reaches_the_attention_of_a_model(monkeypatch):
    seen = []
    flex = KERNELS["flex"].run
    monkeypatch.setitem(
        KERNELS, "flex", ours.Kernel(lambda *inputs: seen.append("flex") or flex(*inputs), devices=("cpu",), half_only=False)
    )
    config = Qwen3Config(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    )
    model = Qwen3ForCausalLM(config).eval()
    logits = []
    for name in ("sdpa", "flex"):
        model.set_attn_implementation(implementation(name))
        with torch.no_grad():
            logits.append(model(torch.arange(51)[None] % 8, use_cache=False, cu_seq_lens_q=borders(LENGTHS), max_length_q=16).logits)
    assert seen == ["flex", "flex"] and worst(*([x] for x in logits)) < TOLERANCE


# --- causality and refusals


def test_causality_is_the_modules_unless_the_call_says_otherwise():
    qkv, module = make_qkv("gqa"), nn.Module()
    given = {"attention_mask": None, "cu_seq_lens_q": borders(LENGTHS), "max_length_q": 16}
    for causal in (True, False):
        module.is_causal = causal
        assert torch.equal(packed_attention(module, *qkv, **given)[0], attend(qkv, causal=causal))
        assert torch.equal(packed_attention(module, *qkv, is_causal=not causal, **given)[0], attend(qkv, causal=not causal))
    with pytest.raises(UserError, match="Module does not say whether it is causal"):
        packed_attention(nn.Module(), *qkv, **given)


def test_without_borders_it_is_a_type_error_that_names_them():
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        packed_attention(Attend(), *make_qkv("gqa"), None, max_length_q=51)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"softcap": 30.0}, "softcap"),
        ({"sliding_window": 8}, "sliding_window=8"),
        ({"longest": 15}, "steps of at most max_length_q = 15"),
        ({"cu": torch.tensor([0, 11, 18])}, "must rise from 0 to 51"),
        ({"cu": torch.tensor([3, 18, 51])}, "must rise from 0 to 51"),
        ({"cu": torch.tensor([0, 18, 11, 51])}, "must rise from 0 to 51"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        attend(make_qkv("gqa"), causal=True, **{"longest": 64, **change})


def test_a_mask_two_rows_and_a_cache_are_refused():
    query, key, value = make_qkv("gqa")
    given = {"cu_seq_lens_q": borders(LENGTHS), "max_length_q": 16}
    with pytest.raises(UserError, match="no mask"):
        packed_attention(Attend(), query, key, value, torch.ones(1, 1, 51, 51), **given)
    with pytest.raises(UserError, match="one row"):
        packed_attention(Attend(), *(torch.cat([x, x]) for x in (query, key, value)), None, **given)
    with pytest.raises(UserError, match="use_cache=False"):
        packed_attention(Attend(), query[:, :, -1:], key, value, None, **given)


def test_a_sliding_window_wider_than_any_segment_changes_nothing_and_passes():
    qkv = make_qkv("gqa")
    assert torch.equal(attend(qkv, causal=True, sliding_window=16), attend(qkv, causal=True))


def test_mixed_precision_reaches_the_kernel_as_one_half_precision_dtype(monkeypatch):
    seen = []
    monkeypatch.setitem(
        KERNELS, "sdpa", ours.Kernel(lambda *qkv_segments: seen.extend(x.dtype for x in qkv_segments[:3]) or qkv_segments[0])
    )
    monkeypatch.setattr(ours, "resolve", lambda *_, **__: "sdpa")
    query, key, value = make_qkv("gqa")
    attend([query, key, value.to(HALF)], causal=True)
    with torch.autocast("cpu", HALF):
        attend([query, key, value], causal=True)
    assert seen == [HALF] * 6
