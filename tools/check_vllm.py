"""Ask vLLM what `parity.json` of an exported folder was asked: `python tools/check_vllm.py FOLDER [--dtype float32]`.

Needs vLLM (its own environment; nothing of this project) and exits 1 when a prompt's token ids or, in float32, a greedy answer differ.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Load the folder, ask every case, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    if not (options.folder / "parity.json").is_file():
        parser.error(f"{options.folder} holds no parity.json: expected a folder that infimed.export wrote")
    proof = json.loads((options.folder / "parity.json").read_text())
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        parser.error(f"vLLM is not installed here ({error}): see docs/export.md for an environment that has it")
    tokens = len(next(iter(proof["cases"].values()))["greedy"][options.dtype])
    longest = max(len(case["prompt_ids"]) for case in proof["cases"].values()) + tokens
    images = max(len(files_of(case["messages"])) for case in proof["cases"].values())
    llm = LLM(
        model=str(options.folder), dtype=options.dtype, max_model_len=longest, limit_mm_per_prompt={"image": images}, enforce_eager=True
    )
    sampling = SamplingParams(temperature=0.0, min_tokens=tokens, max_tokens=tokens)
    failed = False
    for name, case in proof["cases"].items():
        asked = [to_openai(turn, options.folder) for turn in case["messages"]]
        (output,) = llm.chat(asked, sampling, chat_template_content_format="openai", use_tqdm=False)
        prompt_equal = list(output.prompt_token_ids) == case["prompt_ids"]
        equal = equal_tokens(list(output.outputs[0].token_ids), case["greedy"][options.dtype])
        failed |= not prompt_equal or (options.dtype == "float32" and equal < tokens)
        print(f"{name}: prompt ids {'equal' if prompt_equal else 'DIFFER'}, first {equal} of {tokens} greedy tokens equal")
    return int(failed)


def files_of(messages: list[dict]) -> list[str]:
    """Name the pictures of a conversation."""
    return [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]


def to_openai(turn: dict, folder: Path) -> dict:
    """Write a turn as OpenAI's chat interface takes it, pictures inside as data URLs."""
    parts = []
    for part in turn["content"]:
        if part["type"] == "image":
            encoded = base64.b64encode((folder / part["image"]).read_bytes()).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
        parts.append(part)
    return {"role": turn["role"], "content": parts}


def equal_tokens(left: list[int], right: list[int]) -> int:
    """Count the first tokens that are equal."""
    return next((i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right)))


if __name__ == "__main__":
    sys.exit(main())
