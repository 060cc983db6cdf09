"""The model card of an exported folder: what it is, what was verified, what was not; no score, and nothing of the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath

from infimed.processing.resolution import Resolution

BORROWED = {
    "llava": "LLaVA (`LlavaForConditionalGeneration` of transformers); no weights of LLaVA are inside",
    "lfm2_vl": "LFM2-VL (`Lfm2VlForConditionalGeneration` of transformers); no weights of Liquid AI are inside",
}

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [medical, research-only]
---
# {name}

**Research software, not for clinical use.** It has no regulatory clearance, and its answers can be wrong in ways that read well.

## What it is
A medical vision-language model that was trained with InfiMed: SigLIP tower, MLP projector, language model. The architecture class is
borrowed from {borrowed}.
The weights are those of the checkpoint whose sha256 begins with {checkpoint}, in {weights}.

* stage: {stage}
* {resolution}
* started from: {bases}
* licences of the training data: not recorded in the checkpoint; those of the weights that it started from apply too
* scores: none is claimed here; measure this folder's own

## Load it
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")
processor = AutoProcessor.from_pretrained("{name}"){torchvision}
turn = {{"role": "user", "content": [{{"type": "image", "path": "image.png"}}, {{"type": "text", "text": "Describe the image."}}]}}
inputs = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```
Or serve it: `vllm serve {name} --max-model-len 4096`

## What was verified
Before this folder got its name it was loaded with {versions} and compared with the checkpoint on {count} drawn conversations:
the token ids of every prompt are equal, and so are {tokens} greedy tokens each in float32. Largest differences (pixels are numbers
from -1 to 1, the others a share of the largest value):

| | pixels | visual tokens | logits | fewest greedy tokens equal |
|---|---|---|---|---|
{table}

The processor that was compared: {compared}. {auto}
Everything is in `parity.json`, with the sha256 of every file; the conversations' pictures are in `parity/`.

## What was not verified
vLLM, SGLang, llama.cpp, any GPU, any other version of transformers. `tools/check_vllm.py` of InfiMed compares vLLM's answers with
`parity.json`.

## Limitations
* Text that spells a special token (`<|im_end|>`, `<image>`) is read as that token: remove it from what users type.
* Roles other than system, user and assistant, tools, videos and thinking are not known to the chat template, which refuses them.
* Images are seen at the resolution above; findings smaller than a patch after resizing are invisible to the model.

## How it was trained
```json
{options}
```
"""


def model_card(stage: Mapping[str, object], proof: Mapping[str, object], *, resolution: Resolution, name: str) -> str:
    """Fill in the card.

    Args:
        stage: the checkpoint's configuration; only names and numbers are taken over, no place on disk and nothing of the data.
        proof: what parity.json holds.
        name: of the exported folder.
    """
    weights = stage.get("weights") or {}
    bases = [f"{part} {PurePath(str(folder)).name}" for part, folder in weights.items() if folder]
    bases += [f"an earlier checkpoint, {PurePath(str(stage['init_from'])).name}"] if stage.get("init_from") else []
    return TEMPLATE.format(
        name=name,
        borrowed=BORROWED[proof["shell"]],
        checkpoint=proof["checkpoint"],
        weights=proof["weights"],
        stage=stage.get("name", "not recorded"),
        resolution=resolution.describe(),
        bases=", ".join(bases) or "random weights",
        torchvision="  # needs torchvision" if proof["shell"] == "lfm2_vl" else "",
        versions=" and ".join(f"{package} {version}" for package, version in proof["versions"].items()),
        count=len(proof["cases"]),
        tokens=min(len(case["greedy"]["float32"]) for case in proof["cases"].values()),
        table="\n".join(_row(proof["cases"], dtype) for dtype in ("float32", "bfloat16")),
        compared=proof["processor"]["compared"],
        auto=_auto(proof["processor"]["auto"]),
        options=json.dumps(
            {key: _without_places(stage.get(key)) for key in ("max_steps", "global_batch", "seed", "system", "model")}, indent=1
        ),
    )


def _row(cases: Mapping[str, Mapping], dtype: str) -> str:
    worst = [max(case[dtype][what]["apart"] for case in cases.values()) for what in ("pixels", "features", "logits")]
    equal = min(case[dtype]["greedy_tokens_equal"] for case in cases.values())
    return f"| {dtype} | {' | '.join(f'{value:.1e}' for value in worst)} | {equal} |"


def _auto(found: Mapping[str, object]) -> str:
    if not found["run"]:
        return f"AutoProcessor was not run: {found['why']}."
    return f"AutoProcessor ({found['image_processor']}) gives pixels up to {found['pixels']['apart']:.1e} away (a grey level: 7.8e-03)."


def _without_places(node: object) -> object:
    """Keep of every path its last part, so that no machine's folders are published."""
    if isinstance(node, Mapping):
        return {key: _without_places(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_places(value) for value in node]
    return PurePath(node).name if isinstance(node, str) and "/" in node else node
