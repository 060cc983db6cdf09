"""Packed equals unpacked: logits and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from infimed.contracts import Images
from infimed.models.attention import PACKED, attention
from infimed.models.vlm import InfiMed
from tests.conftest import IMAGE_ID, noise

LENGTHS = (11, 7, 1, 16)
TOLERANCE = 2e-6  # worst seen 4.5e-8 for logits, 1.8e-7 for gradients, float32 on a CPU


@dataclass
class Row:
    input_ids: torch.Tensor
    labels: torch.Tensor
    images: Images
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor

    @property
    def where(self) -> dict:
        return {"position_ids": self.position_ids, "cu_seqlens": self.cu_seqlens, "max_seqlen": int(self.cu_seqlens.diff().max())}


def row_of(samples: list[torch.Tensor], images: list[Images]) -> Row:
    ids = torch.cat(samples).unsqueeze(0)
    labels = torch.cat([torch.cat([torch.tensor([-100]), s[1:]]) for s in samples]).unsqueeze(0)
    labels[ids == IMAGE_ID] = -100
    positions = torch.cat([torch.arange(len(s)) for s in samples]).unsqueeze(0)
    cu = torch.tensor([0, *torch.tensor([len(s) for s in samples]).cumsum(0).tolist()], dtype=torch.int32)
    return Row(ids, labels, Images.join(images, patch_dim=147), positions, cu)


@pytest.fixture
def parts() -> tuple[list[torch.Tensor], list[Images]]:
    """Four samples; the first and the last have an image of 2 x 2 visual tokens, the third is a single token."""
    samples = [torch.randint(0, IMAGE_ID, (n,)) for n in LENGTHS]
    images = [noise(*[(4, 4)] * (i in (0, 3))) for i in range(4)]
    samples[0][2:6] = IMAGE_ID
    samples[3][1:5] = IMAGE_ID
    return samples, images


def logits(model: InfiMed, row: Row) -> torch.Tensor:
    return model.language.get_output_embeddings()(model.hidden(row.input_ids, row.images, **row.where))[0]


def gradients(model: InfiMed, rows: list[Row]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for row in rows:
        model(row.input_ids, row.labels, row.images, **row.where).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_logits_of_a_pack_are_those_of_its_samples_alone(make_model, parts):
    model = make_model().eval()
    packed = logits(model, row_of(*parts))
    alone = torch.cat([logits(model, row_of([s], [p])) for s, p in zip(*parts, strict=True)])
    assert (packed - alone).abs().max() < TOLERANCE


def test_gradients_of_a_pack_are_the_sum_of_those_of_its_samples(make_model, parts):
    model = make_model()
    packed = gradients(model, [row_of(*parts)])
    alone = gradients(model, [row_of([s], [p]) for s, p in zip(*parts, strict=True)])
    assert packed.keys() == alone.keys()
    assert all(name in packed for name, _ in model.named_parameters())
    for name, gradient in packed.items():
        assert (gradient - alone[name]).abs().max() < TOLERANCE * max(1.0, alone[name].abs().max()), name


def test_changing_one_sample_leaves_the_logits_of_the_others_untouched(make_model, parts):
    model = make_model().eval()
    samples, images = parts
    before = logits(model, row_of(samples, images))
    samples[1] = (samples[1] + 1) % IMAGE_ID
    after = logits(model, row_of(samples, images))
    changed = (before - after).abs().amax(1) > 0
    assert changed[11:18].any()
    assert not changed[:11].any()
    assert not changed[18:].any()


def test_stock_attention_with_a_cache_does_leak_so_that_the_test_above_means_something(make_model, parts):
    model = make_model().eval()
    row = row_of(*parts)
    embeds = model.embed(row.input_ids, row.images)
    with attention(model.language, "sdpa"):
        stock = model.language(inputs_embeds=embeds, position_ids=row.position_ids, use_cache=True).logits[0]
    assert model.language.config._attn_implementation == PACKED
    assert (stock - logits(model, row)).abs().max() > 1e-3


def test_packed_attention_refuses_a_mask_instead_of_ignoring_it(make_model, parts):
    model = make_model()
    row = row_of(*parts)
    with pytest.raises(ValueError, match="no mask"):
        model.language.model(
            inputs_embeds=model.embed(row.input_ids, row.images),
            attention_mask=torch.ones(1, 1, 35, 35),
            use_cache=False,
            cu_seq_lens_q=row.cu_seqlens,
            max_length_q=16,
        )


def test_packed_attention_without_borders_is_an_error_and_never_one_long_sample(make_model, parts):
    model = make_model()
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        model.language.model(input_ids=row_of(*parts).input_ids, use_cache=False)


def test_mixed_precision_hands_attention_one_dtype_so_that_the_gpu_kernel_is_taken(make_model, parts, monkeypatch):
    """Under autocast norms give float32 queries and keys beside bfloat16 values; the variable-length kernel takes half precision alone."""
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        seen.append({query.dtype, key.dtype, value.dtype})
        return plain(query, key, value, **options)

    monkeypatch.setattr("infimed.models.attention.F.scaled_dot_product_attention", spy)
    row = row_of(*parts)
    with torch.autocast("cpu", torch.bfloat16):
        make_model().hidden(row.input_ids, row.images, **row.where)
    assert len(seen) >= 2 * len(LENGTHS)  # two decoder layers
    assert {torch.float32, torch.bfloat16} not in seen


def test_a_row_without_images_keeps_tower_and_projector_in_the_graph(make_model):
    model = make_model().train()
    row = row_of([torch.randint(0, IMAGE_ID, (9,))], [noise()])
    found = gradients(model, [row])
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all((g == 0).all() for name, g in found.items() if name.startswith(("vision", "projector")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("images", [True, False])
def test_a_training_step_never_waits_for_the_gpu(make_model, parts, images):
    row = row_of(*parts) if images else row_of([torch.randint(0, IMAGE_ID, (9,))], [noise()])
    model, cuda = make_model().to("cuda", torch.bfloat16), torch.device("cuda")
    rows = (row.labels.flatten() != -100).nonzero().squeeze(1).to(cuda)
    ids, labels, positions, cu = (tensor.to(cuda) for tensor in (row.input_ids, row.labels, row.position_ids, row.cu_seqlens))
    given = {"position_ids": positions, "cu_seqlens": cu, "max_seqlen": row.where["max_seqlen"], "rows": rows}
    seen = row.images.to(cuda)
    model(ids, labels, seen, **given).total.backward()  # allocations and handles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, labels, seen, **given).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad is not None for parameter in model.parameters())  # "error" mode has raised at any wait
