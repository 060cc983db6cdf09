"""What the others do, from stock transformers parts: B0 to B3. The same weights, samples and loss as ours, save B1 (see there)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist
from gpu_cases import Row, World, adamw, build, freeze
from gpu_loops import RawLoop
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import SiglipVisionModel

from infimed.contracts import IGNORE_INDEX
from infimed.models.attention import PACKED, resolve
from infimed.models.loss import linear_cross_entropy
from infimed.models.vlm import InfiMed


class Stock(nn.Module):
    """SigLIP on a batch of pictures, the projector, and the causal LM, wired as transformers' LLaVA does it."""

    def __init__(self, ours: InfiMed, *, attention: str) -> None:
        """Take over the weights of our model; the tower becomes the stock one, with SDPA."""
        super().__init__()
        config = copy.deepcopy(ours.vision.config)
        with ours.device:
            self.vision = SiglipVisionModel(config).to(next(ours.parameters()).dtype)
        self.vision.set_attn_implementation("sdpa")
        missing, unexpected = self.vision.load_state_dict(ours.vision.state_dict(), strict=False)
        assert not unexpected, unexpected
        assert all(key.startswith("post_layernorm") for key in missing), missing
        self.vision.post_layernorm = nn.Identity()  # never read: layer -2 is
        self.projector, self.language = ours.projector, ours.language
        self.language.set_attn_implementation(attention)
        side = ours.vision.table_side
        self.grid, self.image_token_id = (side, side), ours.image_token_id

    def embed(self, input_ids_BT: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Embed tokens with their images in place: float[B, T, D]."""
        text_BTD = self.language.get_input_embeddings()(input_ids_BT)
        if not len(pixels):
            return text_BTD
        with torch.set_grad_enabled(self.vision.embeddings.patch_embedding.weight.requires_grad):
            patches = self.vision.embeddings(pixels.to(self.vision.dtype))
            features = self.vision.encoder(inputs_embeds=patches).last_hidden_state
        visual_VD = self.projector(features.flatten(0, 1), [self.grid] * len(pixels))
        return text_BTD.masked_scatter((input_ids_BT == self.image_token_id).unsqueeze(-1), visual_VD.to(text_BTD.dtype))

    def forward(self, score: Callable[..., torch.Tensor], **part: torch.Tensor | int) -> torch.Tensor:
        """Score a part inside `forward`, where sharded weights are whole."""
        return score(self, **part)


def padded_default(world: World) -> RawLoop:
    """B0, transformers' Trainer as it comes: padded to the longest, full logits, float32 under autocast, checkpointing, foreach AdamW."""
    model = _stock(world, torch.float32, attention="sdpa")
    for part in (model.language, model.vision):
        part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    about = {"attention": "sdpa, padded", "precision": _autocast_name(world), "checkpointing": "full"}
    return _loop(world, model, _score_padded, adamw(model, foreach=True), parts=_padded, autocast=True, splittable=True, about=about)


def knapsack(world: World) -> RawLoop:
    """B1, as nanoVLM: rows filled by size, one causal mask over all (documents see each other), full logits, autocast, `.item()` a step."""
    model = _stock(world, torch.float32, attention="sdpa")
    about = {"attention": "sdpa, dense float mask, leaks across documents", "precision": _autocast_name(world)}
    optimizer = adamw(model, foreach=True)
    return _loop(world, model, _score_leaking, optimizer, parts=_knapsack, autocast=True, item=True, splittable=True, about=about)


def packed_transformers(world: World, *, checkpointing: bool = False) -> RawLoop:
    """B2, the best of transformers: packed without padding, flash attention through its keyword arguments, bf16, liger where installed."""
    liger = world.device.type == "cuda" and find_spec("liger_kernel") is not None
    flash = world.device.type == "cuda" and find_spec("flash_attn") is not None
    dtype = torch.float32 if world.precision == "fp32" else torch.bfloat16
    with _liger_modules(liger) as leave:
        model = _stock(world, dtype, attention="flash_attention_2" if flash else PACKED)
    if checkpointing:
        for part in (model.language, model.vision):
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kernel = "flash_attention_2" if flash else resolve("auto", device=world.device, dtype=dtype)
    about = {
        "attention": kernel,
        "precision": str(dtype).removeprefix("torch."),
        "liger": "kernels and fused loss" if liger else "not installed: full logits",
        "checkpointing": "full" if checkpointing else "none",
    }
    optimizer = adamw(model, fused=world.device.type == "cuda")
    score = _score_liger if liger else _score_packed
    return _loop(world, model, score, optimizer, parts=_packed, about=about, close=leave)


def torchtitan(world: World, *, selective: bool = False) -> RawLoop:
    """B3, torchtitan's recipe: compiled blocks, FSDP2's mixed precision on one rank, chunked loss over all rows, a batch of pictures."""
    model = _stock(world, torch.float32, attention=PACKED)
    blocks = [*model.vision.encoder.layers, *model.language.model.layers]
    for block in blocks:
        if selective:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=_save_products)
        # its forward alone: FSDP's hooks run around the block and would break its graph
        block.forward = torch.compile(block.forward, fullgraph=True, backend=world.compiler)
    dtype = torch.float32 if world.precision == "fp32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # one rank; the process group goes when the case is released
    dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh(world.device.type, (1,))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    about = {
        "attention": resolve("auto", device=world.device, dtype=dtype),
        "precision": f"float32 weights, {str(dtype).removeprefix('torch.')} copies",
        "checkpointing": "selective" if selective else "none",
        "compiler": world.compiler,
    }
    optimizer = adamw(model, fused=world.device.type == "cuda")
    return _loop(world, model, _score_all_rows, optimizer, parts=_fixed_row, about=about)


def _stock(world: World, dtype: torch.dtype, *, attention: str) -> Stock:
    model = Stock(build(world, dtype=dtype), attention=attention)
    freeze(model, world.trained)
    return model


def _loop(
    world: World,
    model: Stock,
    score: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    autocast: bool = False,
    **options: object,
) -> RawLoop:
    """Join model and score; autocast does nothing where all is to be float32."""
    autocast = autocast and world.precision != "fp32"
    return RawLoop(world, model, partial(model, score), optimizer, autocast=autocast, **options)


def _autocast_name(world: World) -> str:
    return "float32" if world.precision == "fp32" else "float32 weights, bfloat16 autocast"


# Parts: what a row becomes.


def _lay_out(row: Row, groups: Sequence[Sequence[int]], *, length: int) -> dict:
    """Lay documents end to end, a group a row, padded to `length`; `real` int[B, T] is 0 on padding, `pictures` picks from the row's."""
    starts = [sum(row.lengths[:i]) for i in range(len(row.lengths))]
    ids, labels = row.batch.input_ids[0], row.batch.labels[0]

    def rows_of(values: torch.Tensor, fill: int) -> torch.Tensor:
        rows = [torch.cat([values[starts[i] : starts[i] + row.lengths[i]] for i in group]) for group in groups]
        return torch.stack([F.pad(values, (0, length - len(values)), value=fill) for values in rows])

    each = len(row.pixels) // len(row.lengths)
    pictures = torch.tensor([i * each + j for group in groups for i in group for j in range(each)], device=ids.device, dtype=torch.long)
    laid = {"input_ids": rows_of(ids, 0), "labels": rows_of(labels, IGNORE_INDEX), "real": rows_of(torch.ones_like(ids), 0)}
    return {**laid, "pixels": row.pixels, "pictures": pictures, "slots": len(groups) * length}


def _padded(row: Row, micro_batches: int) -> list[dict]:
    size = -(-len(row.lengths) // micro_batches)
    groups = [range(i, min(i + size, len(row.lengths))) for i in range(0, len(row.lengths), size)]
    return [_lay_out(row, [[i] for i in group], length=max(row.lengths[i] for i in group)) for group in groups]


def _knapsack(row: Row, micro_batches: int) -> list[dict]:
    """Fill rows of a quarter of ours, longest documents first, each where it fits best."""
    length = max(row.batch.input_ids.numel() // 4, *row.lengths)
    groups: list[list[int]] = []
    for i in sorted(range(len(row.lengths)), key=lambda i: -row.lengths[i]):
        room = [length - sum(row.lengths[j] for j in group) - row.lengths[i] for group in groups]
        fits = [(left, number) for number, left in enumerate(room) if left >= 0]
        if fits:
            groups[min(fits)[1]].append(i)
        else:
            groups.append([i])
    size = -(-len(groups) // micro_batches)
    return [_lay_out(row, groups[i : i + size], length=length) for i in range(0, len(groups), size)]


def _packed(row: Row, micro_batches: int) -> list[dict]:
    """Cut our row's tail off and give borders as transformers' padding-free collator does: exact, in no buckets."""
    used = sum(row.lengths)
    cu = F.pad(torch.tensor(row.lengths), (1, 0)).cumsum(0).to(torch.int32)
    cu = cu.to(row.batch.input_ids.device)
    part = {name: getattr(row.batch, name)[:, :used] for name in ("input_ids", "labels", "position_ids")}
    return [{**part, "pixels": row.pixels, "cu": cu, "longest": max(row.lengths), "slots": used}]


def _fixed_row(row: Row, micro_batches: int) -> list[dict]:
    batch = row.batch
    part = {name: getattr(batch, name) for name in ("input_ids", "labels", "position_ids")}
    return [{**part, "pixels": row.pixels, "cu": batch.cu_seqlens, "longest": batch.max_seqlen, "slots": batch.input_ids.numel()}]


# Scores: what a part's summed loss is.


def _score_padded(model: Stock, *, labels: torch.Tensor, real: torch.Tensor, **where: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), device=labels.device)  # a sum: who divides is the loop
    inputs = {"inputs_embeds": _embed_chosen(model, **where), "attention_mask": real}
    return model.language(**inputs, labels=labels, num_items_in_batch=one, use_cache=False).loss


def _embed_chosen(model: Stock, *, input_ids: torch.Tensor, pixels: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    return model.embed(input_ids, pixels[pictures])


def _score_leaking(model: Stock, *, labels: torch.Tensor, real: torch.Tensor, **where: torch.Tensor) -> torch.Tensor:
    embedded_BTD, tokens = _embed_chosen(model, **where), labels.shape[1]
    mask = torch.full((tokens, tokens), float("-inf"), device=labels.device).triu(1).expand(len(labels), 1, -1, -1)
    mask = mask.to(torch.get_autocast_dtype(mask.device.type) if torch.is_autocast_enabled(mask.device.type) else mask.dtype)
    logits_BTV = model.language(inputs_embeds=embedded_BTD, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def _read(model: Stock, input_ids: torch.Tensor, pixels: torch.Tensor, position_ids: torch.Tensor, cu: torch.Tensor, longest: int) -> dict:
    borders = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
    return {"inputs_embeds": model.embed(input_ids, pixels), "position_ids": position_ids, "use_cache": False, **borders}


def _score_packed(model: Stock, *, labels: torch.Tensor, **inputs: torch.Tensor | int) -> torch.Tensor:
    return model.language(**_read(model, **inputs), labels=labels, num_items_in_batch=torch.ones((), device=labels.device)).loss


def _score_liger(model: Stock, *, labels: torch.Tensor, **inputs: torch.Tensor | int) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden_TD = model.language.model(**_read(model, **inputs)).last_hidden_state[0, :-1]
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(model.language.lm_head.weight, hidden_TD, labels[0, 1:])


def _score_all_rows(model: Stock, *, labels: torch.Tensor, **inputs: torch.Tensor | int) -> torch.Tensor:
    hidden_BTD = model.language.model(**_read(model, **inputs)).last_hidden_state
    rows = torch.arange(labels.numel(), device=labels.device)
    return linear_cross_entropy(hidden_BTD, model.language.lm_head.weight, labels, rows=rows).total


@contextmanager
def _liger_modules(wanted: bool) -> Iterator[Callable[[], None]]:
    """Put liger's norm, MLP and RoPE into transformers' Qwen3 for models built inside; the value puts the stock ones back.

    RoPE is looked up at every call: it stays liger's until then.
    """
    from transformers.models.qwen3 import modeling_qwen3

    before = {name: getattr(modeling_qwen3, name) for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP")}

    def leave() -> None:
        vars(modeling_qwen3).update(before)

    if wanted:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(fused_linear_cross_entropy=False)
    try:
        yield leave
    except BaseException:
        leave()
        raise


def _save_products() -> tuple:
    """Keep what torchtitan's selective checkpointing keeps: every second matrix product, and attention."""
    products = {False: 0, True: 0}  # of the forward pass and of its repetition, which must choose alike

    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        if op is torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if products[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        kept = "attn" in str(op) or "attention" in str(op)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


BASELINES = {
    "B0": padded_default,
    "B1": knapsack,
    "B2": packed_transformers,
    "B2gc": partial(packed_transformers, checkpointing=True),
    "B3": torchtitan,
    "B3sac": partial(torchtitan, selective=True),
}
