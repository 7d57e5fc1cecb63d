"""Most of what wants a GPU, in one go: correctness first, then speed.

    python benchmarks/gpu.py results                     all parts, about half an hour
    python benchmarks/gpu.py results --only tests,agreement,qwen3-0.6b
    python benchmarks/gpu.py results --list

Each part has a time limit, writes results/PART.log (and figures to results/PART.json), and the next
one starts whatever became of it. The summary at the end says which failed; so does the exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from models import model_folder  # noqa: E402

TAIL = 25
"""Lines of a part's log that are shown when it has ended."""
_ENV = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@dataclass
class Part:
    name: str
    seconds: int
    """Its time limit."""
    run: Callable[[Part, Path], int]
    """(itself, results folder) -> exit code."""


def command(*arguments: str) -> Callable[[Part, Path], int]:
    """A Python command; {json} stands for the part's file of figures."""

    def run(part: Part, results: Path) -> int:
        figures = str(results / f"{part.name}.json")
        argv = [sys.executable, *(a.replace("{json}", figures) for a in arguments)]
        with open(results / f"{part.name}.log", "w") as log:
            return run_for(argv, part.seconds, log)

    return run


def run_for(argv: list[str], seconds: float, log) -> int:
    """With all its children it ends by then. Exit code 124: it was not done."""
    print("$ " + " ".join(argv[1:]), file=log, flush=True)
    process = subprocess.Popen(
        argv, cwd=ROOT, env=_ENV, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def server(model: str, log_path: Path, seconds: float, *flags: str) -> Iterator[str]:
    """A server of dummy weights on a free port; yields its URL."""
    flags = ("--model-path", model_folder(model, tokenizer=True), "--load-format", "dummy", *flags)
    argv = [sys.executable, "-m", "sglang.launch_server", "--port", "0", *flags]
    with open(log_path, "w") as log:
        process = subprocess.Popen(argv, cwd=ROOT, env=_ENV, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + seconds
            while not (match := re.search(r"served at (http://\S+)\.", log_path.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise TimeoutError(f"no server: see {log_path}")
                time.sleep(0.2)
            yield match.group(1)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()


def serving(model: str, *flags: str) -> Callable[[Part, Path], int]:
    def run(part: Part, results: Path) -> int:
        base = results / part.name
        end = time.monotonic() + part.seconds
        log_path = base.with_suffix(".log")
        try:
            with (
                server(model, results / f"{part.name}-server.log", part.seconds / 2, *flags) as url,
                open(log_path, "w") as log,
            ):
                argv = [sys.executable, "benchmarks/serving.py", "--url", url]
                argv += ["--json", f"{base}.json", "--plot", f"{base}.png"]
                return run_for(argv, end - time.monotonic(), log)
        except TimeoutError as error:
            log_path.write_text(f"{error}\n")
            return 1

    return run


def offline(model: str, machine: str | None, *flags: str) -> Callable[[Part, Path], int]:
    compare = ["--compare", machine] if machine else []
    arguments = ("--model", model, "--json", "{json}", *compare, *flags)
    return command("benchmarks/offline.py", *arguments)


def parallel(part: str) -> Callable[[Part, Path], int]:
    """On one GPU there is nothing to do."""
    return command("benchmarks/tensor_parallel.py", part, "--json", "{json}")


def parts(machine: str | None) -> list[Part]:
    """machine: whose reference figures to show beside ours."""
    about = (
        "import torch, triton, platform, os; print(platform.python_version(), torch.__version__, "
        "triton.__version__, torch.cuda.get_device_name(), os.cpu_count(), 'CPU cores')"
    )
    pytest = ("-m", "pytest", "-x", "-p", "no:cacheprovider")
    return [
        Part("about", 60, command("-c", about)),
        Part("tests", 420, command(*pytest, "-n", "8", "tests/kernels")),  # mostly compilation
        Part("tests-engine", 240, command(*pytest, "tests/engine", "tests/models")),
        Part("agreement", 150, command("benchmarks/agreement.py", "--dtype", "float32")),
        Part("agreement-bf16", 150, command("benchmarks/agreement.py", "--dtype", "bfloat16")),
        Part("seam", 60, command("benchmarks/seam.py", "--json", "{json}")),
        Part("kernels", 300, command("benchmarks/kernels.py", "--quick", "--json", "{json}")),
        Part("qwen3-0.6b", 240, offline("qwen3-0.6b", machine)),
        Part("llama2-7b", 400, offline("llama2-7b", machine)),
        Part("llama2-7b-awq", 400, offline("llama2-7b-awq", machine)),
        Part("serving", 240, serving("qwen3-0.6b", "--context-length", "4096")),
        Part("tp-messages", 90, parallel("messages")),
        Part("tp-tokens", 150, parallel("tokens")),
        Part("tp-speed", 420, parallel("speed")),
        Part("policies", 120, command("benchmarks/policies.py", "--json", "{json}")),
    ]


def which_machine() -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.check_output(query, text=True)
        return next((known for known in ("h200", "h100") if known.upper() in name), None)
    return None


def main() -> int:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="a folder, made if need be")
    parser.add_argument("--only", help="parts, comma-separated")
    parser.add_argument("--budget", type=float, help="seconds: what does not fit is left out")
    parser.add_argument("--list", action="store_true", help="the parts with their time limits")
    args = parser.parse_args()
    todo = parts(which_machine())
    if args.only:
        wanted = args.only.split(",")
        if unknown := set(wanted) - {part.name for part in todo}:
            parser.error(f"no part {', '.join(unknown)}: see --list")
        todo = [part for part in todo if part.name in wanted]
    if args.list:
        print("\n".join(f"{part.name:16} {part.seconds:4} s" for part in todo))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part ends too
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    started, summary = time.monotonic(), []
    for part in todo:
        left = (args.budget or 1e9) - (time.monotonic() - started)
        if left < 30:
            summary.append(f"{part.name:16} left out")
            continue
        part.seconds = min(part.seconds, int(left))
        print(f"=== {part.name} (at most {part.seconds} s)", flush=True)
        start = time.monotonic()
        code = part.run(part, results)
        log = (results / f"{part.name}.log").read_text(errors="replace").splitlines()
        print("\n".join(log[-TAIL:]), flush=True)
        state = {0: "ok", 124: "OUT OF TIME"}.get(code, f"FAILED ({code})")
        summary.append(f"{part.name:16} {state:12} {time.monotonic() - start:6.1f} s")
    print("\n=== summary\n" + "\n".join(summary))
    (results / "summary.txt").write_text("\n".join(summary) + "\n")
    return 1 if any("FAILED" in line or "TIME" in line for line in summary) else 0


if __name__ == "__main__":
    sys.exit(main())
