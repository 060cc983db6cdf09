"""Compare a training step of the language model, packed, with the plain transformers way, padded: real tokens a second.

    python benchmarks/training.py [--model tiny|smollm2] [--mix caption] [--samples 64] [--threads 1] [--repeats 3] [--json FILE]

A step is forward, backward and AdamW over the same samples in every case, with the same weights, float32: loss and gradient norm must agree
before a time is believed. A sample is a template, image tokens (embeddings at hand, unless `--images` adds the tower), then the caption,
which is what is learned. Padded batches hold 8 samples, unsorted, as the Trainer's do. Packed rows hold whole samples up to `--max-tokens`;
a row ends with its last one, and the table says what a plan over a long stream would leave empty. Gradients accumulate; one update a step.

Every run is a process of its own, in the order A B, B A, ...: JSON lines as they finish, the table (medians) last. Rates stand for a CPU
second and for a second of wall time, which other programs lengthen. `--checkpoint` recomputes activations in every case: without it 8
samples of SmolLM2 would need some 20 GB, by estimate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mixes
import numpy as np
import torch
import tower
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from infimed.contracts import IGNORE_INDEX, Images, borders
from infimed.data.catalogue import Table
from infimed.data.packing import exact_fill
from infimed.data.plan import Plan
from infimed.models.attention import PACKED
from infimed.models.loss import linear_cross_entropy

ROOT = Path(__file__).resolve().parents[1]
BATCH = 8  # samples of a padded batch, the Trainer's default
STREAM = 8192  # samples that speak for the whole mix


@dataclass(frozen=True)
class Sample:
    """An image and its caption as embeddings and ids."""

    visual_VD: torch.Tensor  # float[V, D]; with a tower nothing but their number is used
    ids: torch.Tensor  # int64[L], 0 where the image stands
    labels: torch.Tensor  # int64[L], the caption
    image: Images | None  # for the tower, if there is one

    @property
    def start(self) -> int:
        """Position of the first image token."""
        return len(self.ids) - int((self.labels != IGNORE_INDEX).sum()) - len(self.visual_VD)


MIXES = {"caption": mixes.caption}


def real_share(tokens: np.ndarray, *, group: int = BATCH) -> float:
    """Return how much of padded batches is real, for int[samples] lengths in their order."""
    batches = [tokens[i : i + group] for i in range(0, len(tokens), group)]
    return float(tokens.sum() / sum(len(batch) * batch.max() for batch in batches))


def choose(mix: str, count: int) -> tuple[np.ndarray, dict]:
    """Take `count` neighbours of a long stream that are padded as much as the stream: int64[count, 2], and what they are like."""
    stream = MIXES[mix](STREAM)
    tokens = stream.sum(1) + mixes.EXTRA
    whole = real_share(tokens)
    groups = range(0, STREAM - count + 1, count)
    first = min(groups, key=lambda i: abs(real_share(tokens[i : i + count]) - whole))
    chosen = slice(first, first + count)
    facts = {"real_share": real_share(tokens[chosen]), "real_share_of_stream": whole, "tokens": int(tokens[chosen].sum())}
    return stream[chosen], {**facts, "mean_of_stream": float(tokens.mean())}


def stream_fill(mix: str, max_tokens: int) -> float:
    """Return how full the rows of our plan are over a long stream."""
    tokens = MIXES[mix](STREAM).sum(1) + mixes.EXTRA
    plan = Plan(Table(tokens), max_tokens=max_tokens, epochs=1)
    rows = [pack.tokens for step in plan for hand in step.hands for pack in hand]
    return sum(rows) / (len(rows) * max_tokens)


def build(name: str) -> PreTrainedModel:
    """Build a decoder at random init: our tiny Qwen3, or Llama at the size of SmolLM2-135M (30 x 576, V 49,152)."""
    torch.manual_seed(0)
    if name == "tiny":
        return instantiate(OmegaConf.load(ROOT / "conf" / "model" / "tiny.yaml").language)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)


def draw(lengths: np.ndarray, language: PreTrainedModel, *, images: bool = False) -> list[Sample]:
    """Make samples of random content, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for text, wanted in lengths.tolist():
        picture = tower.draw(wanted, generator=generator) if images else None
        image = len(picture.patches) // tower.POOL**2 if images else wanted
        lead = mixes.EXTRA
        ids = torch.randint(1, language.config.vocab_size, (lead + image + text,), generator=generator)
        ids[lead : lead + image] = 0
        labels = torch.where(torch.arange(len(ids)) < lead + image, IGNORE_INDEX, ids)
        visual_VD = torch.randn(image, language.config.hidden_size, generator=generator) * 0.02
        samples.append(Sample(visual_VD, ids, labels, picture))
    return samples


@dataclass(frozen=True)
class Way:
    """One way to train: how samples share a tensor, and how the loss is taken."""

    packed: bool
    our_loss: bool
    by_length: bool = False  # samples sorted before they are cut into batches


WAYS = {
    "padded": Way(packed=False, our_loss=False),
    "padded by length": Way(packed=False, our_loss=False, by_length=True),
    "padded, our loss": Way(packed=False, our_loss=True),
    "packed, full logits": Way(packed=True, our_loss=False),
    "packed": Way(packed=True, our_loss=True),
}


def cut(samples: Sequence[Sample], way: Way, *, max_tokens: int) -> list[list[Sample]]:
    """Group samples into padded batches or packed rows."""
    if not way.packed:
        ordered = sorted(samples, key=lambda s: -len(s.ids)) if way.by_length else samples
        return [list(ordered[i : i + BATCH]) for i in range(0, len(samples), BATCH)]
    waiting, rows = list(samples), []
    while waiting:
        chosen = exact_fill([len(s.ids) for s in waiting], max_tokens)
        rows.append([waiting[i] for i in chosen])
        waiting = [s for i, s in enumerate(waiting) if i not in chosen]
    return rows


def tensors(group: Sequence[Sample], way: Way) -> dict[str, torch.Tensor | Images | dict | int]:
    """Lay a group out, as a collator does ahead of the step."""
    visual, lengths = torch.cat([s.visual_VD for s in group]), [len(s.ids) for s in group]
    if group[0].image is not None:
        images = [s.image for s in group]
        visual = Images.join(images, patch_dim=images[0].patches.shape[1]) if way.packed else tower.pad(images)
    where = [F.pad(torch.ones(len(s.visual_VD)), (s.start, len(s.ids) - s.start - len(s.visual_VD))).bool() for s in group]
    if way.packed:
        ids, labels, placeholder = (torch.cat(list(x)).unsqueeze(0) for x in ([s.ids for s in group], [s.labels for s in group], where))
        positions, cu = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0), borders(lengths)
        place = {"position_ids": positions, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
        place |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        ids, placeholder = pad([s.ids for s in group], batch_first=True), pad(where, batch_first=True)
        labels = pad([s.labels for s in group], batch_first=True, padding_value=IGNORE_INDEX)
        place = {"attention_mask": pad([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True)}
    rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    return {"ids": ids, "visual": visual, "placeholder": placeholder, "labels": labels, "rows": rows, **place}


def loss_of(language: PreTrainedModel, way: Way, batch: dict, *, supervised: int, see: nn.Module) -> torch.Tensor:
    """Return this batch's part of the mean loss a supervised token."""
    ids, visual, placeholder, labels, rows, *_ = batch.values()
    place = {name: batch[name] for name in list(batch)[5:]}
    embeds = language.get_input_embeddings()(ids).masked_scatter(placeholder.unsqueeze(-1), see(visual))
    if not way.packed and not way.our_loss:  # exactly what the Trainer calls
        return language(inputs_embeds=embeds, labels=labels, num_items_in_batch=supervised, use_cache=False, **place).loss
    hidden_BTD = language.model(inputs_embeds=embeds, use_cache=False, **place).last_hidden_state
    if way.our_loss:
        return linear_cross_entropy(hidden_BTD, language.lm_head.weight, labels, rows=rows).total / supervised
    return ForCausalLMLoss(language.lm_head(hidden_BTD), labels, language.config.vocab_size, num_items_in_batch=supervised)


def measure(case: str, *, model: str, mix: str, samples: int, max_tokens: int, threads: int, checkpoint: bool, images: bool) -> dict:
    """Time one step in this process, after one of a single short row that loads libraries and makes AdamW's states."""
    torch.set_num_threads(threads)
    way, language = WAYS[case], build(model)
    language.train().set_attn_implementation(PACKED if way.packed else "sdpa")
    if checkpoint:
        language.gradient_checkpointing_enable()
    lengths, facts = choose(mix, samples)
    see = tower.See(packed=way.packed, out_features=language.config.hidden_size) if images else nn.Identity()
    learning = nn.ModuleList([language, see])
    drawn = draw(lengths, language, images=images)
    facts["tokens"] = sum(len(s.ids) for s in drawn)
    groups = [tensors(group, way) for group in cut(drawn, way, max_tokens=max_tokens)]
    supervised = int(lengths[:, 0].sum())
    optimizer = torch.optim.AdamW(learning.parameters(), lr=0.0)  # the warm-up must not change the weights; the arithmetic is the same

    def step(batches: Sequence[dict]) -> float:
        total = 0.0
        for batch in batches:
            loss = loss_of(language, way, batch, supervised=supervised, see=see)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total

    step([tensors(draw(np.array([[8, 9]]), language, images=images), way)])
    optimizer.zero_grad()
    before, wall, cpu = _peak_mib(), time.perf_counter(), time.process_time()
    loss = step(groups)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    norm = float(torch.stack([p.grad.norm() for p in learning.parameters()]).norm())
    shape = {"tensors": len(groups), "slots": sum(group["ids"].numel() for group in groups)}
    return {"wall_s": wall, "cpu_s": cpu, "loss": loss, "grad_norm": norm, "peak_mib": _peak_mib(), "start_mib": before, **shape, **facts}


def _peak_mib() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def check_agreement(found: Sequence[dict]) -> None:
    """Refuse to compare the times of cases that computed different things.

    Raises:
        AssertionError: the mean loss a token differs by more than 1e-4, or the gradient norm by more than 1e-3 of itself.
    """
    first = found[0]
    for one in found:
        assert abs(one["loss"] - first["loss"]) <= 1e-4, f"loss of {one['case']}: {one['loss']}; of {first['case']}: {first['loss']}"
        assert abs(one["grad_norm"] / first["grad_norm"] - 1) <= 1e-3, f"gradient of {one['case']}: {one['grad_norm']}"


def table(found: Sequence[dict]) -> str:
    """Draw medians of every case, and ratios to the first."""
    lines = ["| case | x padded (CPU) | x padded (wall) | tokens / CPU s | tokens / s | CPU s a step | slots | real | peak MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    base: list[float] = []
    for case in dict.fromkeys(x["case"] for x in found):
        runs = [x for x in found if x["case"] == case]
        cpu, wall, peak = (statistics.median(x[key] for x in runs) for key in ("cpu_s", "wall_s", "peak_mib"))
        base = base or [cpu, wall]
        tokens, slots = runs[0]["tokens"], runs[0]["slots"]
        ratios = f"{base[0] / cpu:.2f} | {base[1] / wall:.2f}"
        rates = f"{tokens / cpu:,.0f} | {tokens / wall:,.0f} | {cpu:.1f}"
        lines.append(f"| {case} | {ratios} | {rates} | {slots:,} | {tokens / slots:.1%} | {peak:,.0f} |")
    return "\n".join(lines)


def _child(case: str, settings: dict) -> dict:
    command = [sys.executable, __file__, "--child", json.dumps({"case": case, **settings})]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    return {"case": case, **settings, **json.loads(result)}


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--mix", choices=tuple(MIXES), default="caption")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--images", action="store_true", help="with the any-aspect tower of the tiny model, trained, in every case")
    parser.add_argument("--cases", default=",".join(name.replace(", ", "+") for name in WAYS), help="some of these; the first is the base")
    parser.add_argument("--json", type=Path, help="file that the JSON lines are added to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return
    settings = {name: getattr(arguments, name) for name in ("model", "mix", "samples", "max_tokens", "threads", "checkpoint", "images")}
    cases = [name.replace("+", ", ") for name in arguments.cases.split(",")]
    found: list[dict] = []
    for repeat in range(arguments.repeats):
        for case in cases if repeat % 2 == 0 else reversed(cases):
            found.append(_child(case, settings))
            print(json.dumps(found[-1]), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    check_agreement(found)
    fill = (
        f"the plan's rows of {arguments.max_tokens} over {STREAM} samples are {stream_fill(arguments.mix, arguments.max_tokens):.2%} full"
    )
    share = f"padded batches of the stream are {found[0]['real_share_of_stream']:.1%} real"
    print(f"\nCPU, {arguments.threads} thread(s); torch {torch.__version__}; {settings}; {fill}, {share}\n\n{table(found)}")


if __name__ == "__main__":
    main()
