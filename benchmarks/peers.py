"""What other engines make of the workloads in benchmarks/offline.py, to stand beside our figures.
A picture of both, from files that offline.py --json has written:

    python benchmarks/peers.py h200 qwen3-0.6b.json llama2-7b.json --plot docs/h200.svg

Measured in November 2026 with the same prompts, on one GPU: random weights; Qwen in bfloat16, Llama
in float16 (mini-sglang: bfloat16). "floor" is no measurement but arithmetic: the bytes and FLOPs of
the workload over what the GPU reads (4.42 TB/s) and multiplies (743 bf16 TFLOP/s). Figures compare
only with figures of the same kind of machine.

vLLM is 0.24.0, SGLang 0.5.16, mini-sglang of March 2026.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

UNITS = {
    "startup": "s",
    "bs1": "tok/s",
    "ttft128": "ms",
    "ttft512": "ms",
    "ttft2048": "ms",
    "ttft3900": "ms",
    "offline256": "tok/s",
    "prefix256": "req/s",
    "prefill256x1024": "tok/s",
    "short1024": "req/s",
}
LESS_IS_BETTER = ("s", "ms")


def _figures(*values: float | None) -> dict[str, float]:
    """In the order of UNITS."""
    return {name: v for name, v in zip(UNITS, values, strict=True) if v is not None}


# fmt: off
_ = None
# machine -> model -> engine -> figures
#   startup  bs1  ttft128  512  2048  3900  offline256  prefix256  prefill  short1024
REFERENCES: dict[str, dict[str, dict[str, dict[str, float]]]] = {
    "h200": {
        "qwen3-0.6b": {
            "vllm": _figures(164, 581, 7.4, 7.7, 17.1, 18.0, 23400, 385, 393000, 1170),
            "sglang": _figures(104, 629, 8.2, 8.1, 8.4, 14.1, 21400, 449, 409000, 1000),
            "mini-sglang": _figures(56, 573, 9.2, 9.0, 9.3, 12.2, 21900, 291, 447000, 2130),
            "floor": _figures(_, 3500, _, _, 3, 7, 34000, 500, 745000, 10000),
        },
        "llama2-7b": {
            "vllm": _figures(77, 220, 17.2, 18.6, 48.4, 89.2, 5690, 110, 48000, 940),
            "sglang": _figures(66, 226, 11.9, 16.6, 47.1, 89.6, 5430, 107, 47800, 617),
            "mini-sglang": _figures(23, 224, 7.7, 11.6, 45.4, 88.1, 5500, 110, 46600, 1090),
            "floor": _figures(_, 320, 3.2, 9.2, 37, 74, 6600, 122, 55000, _),
        },
        "llama2-7b-awq": {
            "vllm": _figures(54, 267, 8.4, 14.9, 46, 91, 5680, 116, 51400, 862),
            "sglang": _figures(307, 350, 11.8, 24.9, 83, 164, 4530, 86, 26200, 513),
            "floor": _figures(_, 1160, _, _, _, _, _, _, 55000, _),
        },
    },
    "h100": {
        "qwen3-0.6b": {
            "vllm": _figures(203, 386, 12.6, 13.3, 31.5, 33.8, 17900, 303, 351000, 952),
        },
        "llama2-7b": {
            "vllm": _figures(198, 168, 10.5, 15.0, 49.4, 91.6, 3660, _, _, _),
        },
    },
}
# fmt: on


def references(machine: str, model: str) -> dict[str, dict[str, float]]:
    """{engine: {workload: figure}}: machine is "h200" or "h100", or "vllm-h200" for one engine.

    Raises ValueError where nothing is known of it.
    """
    engine, _, name = machine.rpartition("-")
    if name not in REFERENCES:
        raise ValueError(f"no figures of {machine}; there are: {', '.join(REFERENCES)}")
    known = REFERENCES[name].get(model, {})
    if engine and engine not in known:
        raise ValueError(f"no figures of {engine} for {model}; there are: {', '.join(known)}")
    return {engine: known[engine]} if engine else known


def times_the_best(workload: str, ours: float, peers: list[dict[str, float]]) -> float | None:
    """How many times as fast we are as the best of them. None: they did not run it."""
    theirs = [figures[workload] for figures in peers if workload in figures]
    if not theirs:
        return None
    return min(theirs) / ours if UNITS[workload] in LESS_IS_BETTER else ours / max(theirs)


def plot(ratios: dict[str, dict[str, float]], title: str, path: str) -> None:
    """{model: {workload: ratio}}"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.fonttype"] = "none"
    workloads = [name for name in UNITS if any(name in of_model for of_model in ratios.values())]
    figure, axes = pyplot.subplots(figsize=(10, 3.8))
    width = 0.8 / len(ratios)
    for i, (model, of_model) in enumerate(ratios.items()):
        at = [x + (i - (len(ratios) - 1) / 2) * width for x in range(len(workloads))]
        heights = [of_model.get(name, float("nan")) for name in workloads]
        bars = axes.bar(at, heights, width, label=model)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="times as fast as the best peer", title=title)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", choices=REFERENCES)
    parser.add_argument("figures", nargs="+", type=Path, help="of one model each")
    parser.add_argument("--plot", required=True, help="draw them into this file")
    args = parser.parse_args()
    ratios = {}
    for path in args.figures:
        record = json.loads(path.read_text())
        others = references(args.machine, record["model"])
        peers = [figures for name, figures in others.items() if name != "floor"]
        ratios[record["model"]] = {
            name: ratio
            for name, values in record["runs"].items()
            if (ratio := times_the_best(name, values[-1], peers)) is not None
        }
    plot(ratios, f"One {args.machine.upper()}, random weights", args.plot)


if __name__ == "__main__":
    main()
