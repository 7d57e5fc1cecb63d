"""The engines that benchmarks/offline.py can drive, behind one method."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from models import CONFIGS, DEMO, model_folder

MAX_LEN, MEMORY_FRACTION = 4096, 0.85
"""Longest request in tokens, and part of the GPU's memory: the same for every engine."""


class Engine(Protocol):
    def generate(
        self, prompts: list[list[int]], lengths: list[int], temperature: float
    ) -> list[list[int]]:
        """Exactly lengths[i] new tokens for each prompt, given and returned as token ids."""
        ...

    def close(self) -> None: ...


class Sglang:
    def __init__(self, model: str, dummy: bool, flags: list[str]) -> None:
        import sglang
        from sglang.server_args import parse_args

        path = [] if model == DEMO else ["--model-path", model_folder(model)]
        ours = ["--load-format", "dummy"] if dummy else []
        ours += ["--skip-tokenizer-init", "--log-level", "warning"]
        ours += ["--context-length", str(MAX_LEN), "--mem-fraction-static", str(MEMORY_FRACTION)]
        args = parse_args([*path, *ours, *flags])  # of a flag given twice the last one counts
        self.llm = sglang.LLM(**dataclasses.asdict(args))

    def generate(
        self, prompts: list[list[int]], lengths: list[int], temperature: float
    ) -> list[list[int]]:
        from sglang import SamplingParams

        params = [
            SamplingParams(max_new_tokens=n, temperature=temperature, ignore_eos=True)
            for n in lengths
        ]
        replies = self.llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        return [reply["output_ids"] for reply in replies]

    def close(self) -> None:
        self.llm.shutdown()


class Vllm:
    def __init__(self, model: str, dummy: bool, flags: list[str]) -> None:
        import vllm

        _refuse(flags, "vllm")
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model_folder(model),
            load_format="dummy" if dummy else "auto",
            skip_tokenizer_init=True,
            max_model_len=MAX_LEN,
            gpu_memory_utilization=MEMORY_FRACTION,
            enable_prefix_caching=True,
        )

    def generate(
        self, prompts: list[list[int]], lengths: list[int], temperature: float
    ) -> list[list[int]]:
        params = [
            self._params(max_tokens=n, temperature=temperature, ignore_eos=True, detokenize=False)
            for n in lengths
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        pass


class Transformers:
    """`generate` on batches of requests of similar output length, padded on the left: what one
    would write without a server. Every batch runs to its longest output."""

    BATCH = 32

    def __init__(self, model: str, dummy: bool, flags: list[str]) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        _refuse(flags, "transformers")
        self._torch = torch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if model == DEMO:
            from tests.reference import demo_model_in_transformers

            self.model = demo_model_in_transformers()[0].to(self.device)
        else:
            path = model_folder(model)
            config = AutoConfig.from_pretrained(path)
            dtype = torch.float32 if self.device.type == "cpu" else config.dtype
            with self.device:
                if dummy:
                    self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)
                else:
                    self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.model.eval()
        self.model.generation_config.eos_token_id = None  # never stop early

    def generate(
        self, prompts: list[list[int]], lengths: list[int], temperature: float
    ) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (lengths[i], len(prompts[i])))
        for start in range(0, len(order), self.BATCH):
            batch = order[start : start + self.BATCH]
            new = self._batch([prompts[i] for i in batch], lengths[batch[-1]], temperature)
            for i, ids in zip(batch, new, strict=True):
                outputs[i] = ids[: lengths[i]]
        return outputs

    def _batch(self, prompts: list[list[int]], length: int, temperature: float) -> list[list[int]]:
        torch = self._torch
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device
        )
        draw = {"do_sample": False}
        if temperature > 0:
            draw = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=length, pad_token_id=0, **draw
            )
        return out[:, width:].tolist()

    def close(self) -> None:
        pass


def _refuse(flags: list[str], engine: str) -> None:
    if flags:
        raise SystemExit(f"{flags[0]} is a flag of sglang: it says nothing to {engine}")


ENGINES: dict[str, Any] = {"sglang": Sglang, "vllm": Vllm, "transformers": Transformers}


def make_engine(name: str, model: str, dummy: bool | None, flags: list[str]) -> Engine:
    """dummy None: for the built-in configurations, which have no weights."""
    return ENGINES[name](model, model in CONFIGS if dummy is None else dummy, flags)
