"""What several GPUs make of one model:

    python benchmarks/tensor_parallel.py messages --json messages.json
    python benchmarks/tensor_parallel.py tokens
    python benchmarks/tensor_parallel.py speed --json speed.json

    messages   an all-reduce by its size, one shot and NCCL's, and sampling from shares of the
               logits and from gathered ones: microseconds within a CUDA graph
    tokens     the demo model in float32 says the same on one rank and on several, with CUDA graphs
               and without; in bfloat16 the ranks agree with each other under load
    speed      Llama-2-7B and 13B, random weights: one request, and offline256, on one rank and on
               several; flags that are not known here are the server's

The workloads are those of benchmarks/offline.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for tests.reference
SIZES = [1 << i for i in range(10, 26)]  # 1 KB to 32 MB
MODELS = ("llama2-7b", "llama2-13b")
ROUND_SECONDS = 240
"""What has not been measured by then is left out."""


# --- messages ------------------------------------------------------------------------------------


def messages(ranks: int) -> dict[str, Any]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_messages_of_rank, (ranks, folder), nprocs=ranks)
        figures = json.loads(Path(folder, "figures.json").read_text())
    return figures


def _messages_of_rank(rank: int, ranks: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from sglang.worker.parallel import TensorParallel

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    tp = TensorParallel.join(rank, ranks, f"{folder}/rendezvous", device)
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "ranks": ranks}

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)
            Path(folder, "figures.json").write_text(json.dumps(figures))

    if tp.symmetric is None:
        say("no symmetric memory here")
    else:
        _check_sums(tp, device)
    figures["all_reduce_us"] = {}
    for size in SIZES:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        times = {"nccl": _microseconds(lambda x=x: dist.all_reduce(x), size)}
        if tp.symmetric is not None and tp.symmetric.holds(x):
            times["one_shot"] = _microseconds(lambda x=x: tp.symmetric.all_reduce(x), size)
        figures["all_reduce_us"][size] = times
        took = ", ".join(f"{name} {us:.1f} us" for name, us in times.items())
        say(f"all-reduce of {size >> 10} KB: {took}")

    figures["sampling_us"] = {}
    for rows, vocab in ((1, 32000), (1, 151936), (256, 32000), (256, 151936)):
        times = _sampling_times(tp, rows, vocab, device)
        figures["sampling_us"][f"{rows}x{vocab}"] = times
        took = ", ".join(f"{name} {us:.1f} us" for name, us in times.items())
        say(f"a token for {rows} rows of {vocab} logits: {took}")
    dist.destroy_process_group()


def _check_sums(tp, device) -> None:
    """Sums of all sizes are right, and the same bits on all ranks."""
    import torch

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for turn, count in enumerate((1, 4096, 5120, 37, 256 * 4096, 4096, 100_000) * 3):
            shares = [
                torch.randn(count, generator=torch.Generator().manual_seed(10 * turn + r))
                for r in range(tp.size)
            ]
            shares = [share.to(dtype).to(device) for share in shares]
            expected = sum(share.float() for share in shares).to(dtype)
            got = tp.symmetric.all_reduce(shares[tp.rank].clone())
            assert torch.equal(got, expected), (dtype, count, (got - expected).abs().max())


def _microseconds(run, size: int = 0) -> float:
    """Of one call, in a graph of many; the slowest rank's."""
    import torch
    import torch.distributed as dist

    calls, replays = (50, 20) if size <= 1 << 20 else (10, 10)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first warms up
        dist.barrier()
        torch.cuda.synchronize()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
    took = torch.tensor([start.elapsed_time(end) * 1e3 / calls / replays], device="cuda")
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def _sampling_times(tp, rows: int, vocab: int, device) -> dict[str, float]:
    import torch

    from sglang.kernels.sampling import sample
    from sglang.kernels.sharded_sampling import best_keys, tokens_of

    share = vocab // tp.size
    logits = torch.randn(rows, share, dtype=torch.bfloat16, device=device)
    temperature = torch.full((rows,), 0.6, device=device)
    ones = torch.ones(rows, device=device)
    zeros = torch.zeros(rows, dtype=torch.int32, device=device)

    def from_shares() -> torch.Tensor:
        keys = best_keys(logits, tp.rank * share, temperature, zeros, zeros)
        return tokens_of(tp.all_reduce(keys, largest=True), vocab)

    def gathered() -> torch.Tensor:
        return sample(tp.all_gather(logits), temperature, zeros, ones, zeros.float(), zeros, zeros)

    assert torch.equal(from_shares(), gathered())
    return {"shares": _microseconds(from_shares), "gathered": _microseconds(gathered)}


# --- tokens --------------------------------------------------------------------------------------


def tokens(ranks: int, device: str, count: int) -> int:
    """Returns how many comparisons failed."""
    import sglang
    from sglang.model_config import ModelConfig
    from sglang.server_args import ServerArgs
    from sglang.tokenizer import Tokenizer
    from tests.engine.prompts import PROMPTS
    from tests.reference import demo_model_for_ranks

    args = ServerArgs(device=device)
    tokenizer = Tokenizer.load(ModelConfig.load(args), args)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[:count]]
    greedy = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}
    mixed = [
        greedy | {"seed": i, "temperature": 0.8 * (i % 4 > 0), "top_p": 0.9 if i % 4 == 2 else 1.0}
        for i in range(len(prompts))
    ]
    small = {  # chunks, preemption, few graphs
        "max_total_tokens": 1500, "chunked_prefill_size": 64, "max_running_requests": 24,
        "schedule_conservativeness": 0.0, "context_length": 1024,
    }  # fmt: skip

    def say(folder: str, what: str, **flags) -> list:
        start = time.perf_counter()
        flags = {"device": device, "skip_tokenizer_init": True, "check_ranks": True} | flags
        with sglang.LLM(folder, **flags) as llm:
            ready = time.perf_counter()
            outputs = [
                [reply["output_ids"] for reply in llm.generate(prompts, params, use_tqdm=False)]
                for params in (greedy, mixed)
            ]
            end, stats = time.perf_counter(), llm.stats()
        print(
            f"{what}: ready after {ready - start:.1f} s, {stats.generated_tokens} tokens in "
            f"{end - ready:.1f} s, {stats.preemptions} preemptions",
            flush=True,
        )
        return outputs

    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        demo_model_for_ranks(Path(folder))
        exact = small | {"dtype": "float32"}
        expected = say(folder, "float32, 1 rank", **exact)
        for name, flags in (("CUDA graphs", {}), ("no graphs", {"disable_cuda_graph": True})):
            got = say(folder, f"float32, {ranks} ranks, {name}", tp_size=ranks, **exact, **flags)
            for kind, ours, theirs in zip(("greedy", "mixed"), got, expected, strict=True):
                same = sum(a == b for a, b in zip(ours, theirs, strict=True))
                failed += same < len(theirs)
                print(f"  {kind}: {same} of {len(theirs)} outputs as on 1 rank", flush=True)
        prompts *= 8
        mixed *= 8
        load = {"dtype": "bfloat16", "context_length": 1024, "max_running_requests": 128}
        say(folder, f"bfloat16, {ranks} ranks", tp_size=ranks, **load)
        print("  ranks agreed at every step")
    return failed


# --- speed ---------------------------------------------------------------------------------------


def speed(ranks: int, models: list[str], extra: list[str]) -> dict[str, Any]:
    """Models on one rank run side by side, each on a GPU of its own."""
    figures: dict[str, dict[str, list[float]]] = {}
    rounds = [[(model, ranks, None)] for model in models]
    rounds += [[(model, 1, gpu) for gpu, model in enumerate(models)]]
    with tempfile.TemporaryDirectory() as folder:
        for runs in rounds:
            processes = [_offline(model, tp, gpu, folder, extra) for model, tp, gpu in runs]
            end = time.monotonic() + ROUND_SECONDS
            try:
                for process in processes:
                    process.wait(max(end - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                print(f"not done after {ROUND_SECONDS} s", flush=True)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
            for model, tp, _ in runs:
                path = Path(folder, f"{model}-{tp}.json")
                if path.exists():
                    figures[f"{model} tp {tp}"] = json.loads(path.read_text())["runs"]
    for model in models:
        if (one := figures.get(f"{model} tp 1")) and (many := figures.get(f"{model} tp {ranks}")):
            _compare(model, one, many)
    return figures


def _compare(model: str, one: dict[str, list[float]], many: dict[str, list[float]]) -> None:
    for name in {"bs1", "offline256"} & one.keys() & many.keys():
        a, b = one[name][-1], many[name][-1]
        print(f"{model} {name}: {a:,.4g} on 1 rank, {b:,.4g} on several: {b / a:.2f}x", flush=True)


def _offline(
    model: str, tp: int, gpu: int | None, folder: str, extra: list[str]
) -> subprocess.Popen:  # fmt: skip
    argv = [sys.executable, str(ROOT / "benchmarks/offline.py"), "--model", model]
    argv += ["--only", "bs1,offline256", "--json", f"{folder}/{model}-{tp}.json"]
    env = dict(os.environ)
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = str(gpu)
    print(f"{model} on {tp} rank{'s' * (tp > 1)}", flush=True)
    return subprocess.Popen([*argv, "--tp-size", str(tp), *extra], env=env)


def main() -> int:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("part", choices=("messages", "tokens", "speed"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="of tokens")
    parser.add_argument("--prompts", type=int, default=32, help="of tokens")
    parser.add_argument("--models", default=",".join(MODELS), help="of speed, comma-separated")
    parser.add_argument("--json", help="write the figures here")
    args, extra = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends too
    if args.part == "tokens":
        return tokens(args.ranks, args.device, args.prompts)
    if args.part == "messages":
        figures = messages(args.ranks)
    else:
        figures = speed(args.ranks, args.models.split(","), extra)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
