"""Does the demo model say the same as in transformers, on the same device?

    python benchmarks/agreement.py --dtype float32

Greedy, a prompt of the tests at a time and all at once. In float32 the tokens should be the same.
In a 16-bit type two ways to round soon disagree on a near tie and then go on differently: there,
every token is held against what transformers would have said after the same beginning.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.reference
import torch

from tests.engine.prompts import PROMPTS
from tests.reference import demo_model_in_transformers


def ours(
    dtype: str, length: int, flags: list[str]
) -> tuple[list[list[int]], list[list[int]], list]:
    """(prompts, tokens one at a time, tokens all at once)."""
    import sglang
    from sglang import SamplingParams
    from sglang.server_args import parse_args

    args = parse_args(["--dtype", dtype, "--log-level", "warning", *flags])
    params = SamplingParams(max_new_tokens=length, temperature=0.0, ignore_eos=True)
    with sglang.LLM(**dataclasses.asdict(args)) as llm:
        assert llm.tokenizer is not None
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
        in_turn = [llm.generate([p], params, use_tqdm=False)[0]["output_ids"] for p in prompts]
        llm.flush_cache()
        at_once = [r["output_ids"] for r in llm.generate(prompts, params, use_tqdm=False)]
    return prompts, in_turn, at_once


def surprises(model, prompt: list[int], output: list[int]) -> tuple[int, float]:
    """(how many tokens of the output are not the most likely one after what stands before them, how
    far below it the worst of them is, in nats)."""
    ids = torch.tensor([prompt + output], device=model.device)
    with torch.inference_mode():
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    chosen = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
    below = logprobs.max(-1).values - chosen
    return int((below > 0).sum()), float(below.max())


def main() -> int:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--length", type=int, default=48, help="tokens (default: 48)")
    args, flags = parser.parse_known_args()

    prompts, in_turn, at_once = ours(args.dtype, args.length, flags)
    device = "cuda" if torch.cuda.is_available() and "cpu" not in flags else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    model, _ = demo_model_in_transformers()
    model = model.to(device=device, dtype=getattr(torch, args.dtype))
    print(f"{args.dtype} on {device}, {len(prompts)} prompts x {args.length} tokens")
    total, bad = len(prompts) * args.length, False
    for name, outputs in (("one at a time", in_turn), ("all at once", at_once)):
        found = [surprises(model, p, o) for p, o in zip(prompts, outputs, strict=True)]
        count, worst = sum(n for n, _ in found), max(below for _, below in found)
        same = sum(n == 0 for n, _ in found)
        print(
            f"{name}: {same} of {len(prompts)} outputs are what transformers says; {count} of "
            f"{total} tokens are another's choice, the worst {worst:.4f} nats below the best"
        )
        bad |= worst > {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}[args.dtype]
    if bad:
        print("FAILED: that is more than rounding")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
