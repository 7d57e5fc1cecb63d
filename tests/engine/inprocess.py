"""Scheduler and model runner in one process: the engine without its sockets, to test it in numbers.

As in the real engine up to `depth` steps are in flight: a plan is made before the results of the
one before it are known.
"""

from __future__ import annotations

from collections import deque

from sglang.messages import GenerateRequest, pack, unpack
from sglang.model_config import ModelConfig
from sglang.router.scheduler import Scheduler
from sglang.sampling_params import SamplingParams
from sglang.server_args import ServerArgs
from sglang.worker.parallel import TensorParallel
from sglang.worker.runner import ModelRunner


class InProcessEngine:
    def __init__(
        self, args: ServerArgs, config: ModelConfig | None = None, tp: TensorParallel | None = None
    ) -> None:
        self.args = args
        self.config = config or ModelConfig.load(args)
        self.runner = ModelRunner(args, self.config, tp or TensorParallel())

    def scheduler(self, **kwargs) -> Scheduler:
        """A new one, over the same weights; its slots may be fewer than the pool has."""
        options = {
            "num_slots": self.runner.kv_cache.num_slots,
            "num_rows": self.runner.rows.num_rows,
            "max_len": self.config.context_len,
            "chunk_size": self.runner.chunk_size,
            "eos": self.config.eos_token_ids,
        }
        return Scheduler(**{**options, **kwargs})

    def generate(
        self,
        scheduler: Scheduler,
        prompts: list[list[int]],
        params: SamplingParams | list[SamplingParams],
        depth: int = 2,
        at_once: bool = True,
    ) -> list[list[int]]:
        """Token ids that each prompt yields; `at_once` or each when the one before it is done.
        params: one for all, or one for each."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        arriving = deque(enumerate(prompts))
        outputs: list[list[int]] = [[] for _ in prompts]
        sent: deque = deque()
        while arriving or not scheduler.is_idle():
            while arriving and (at_once or scheduler.is_idle()):
                handle, prompt = arriving.popleft()
                scheduler.add(GenerateRequest(handle, pack(prompt), each[handle]))
            if len(sent) < depth and (step := scheduler.plan()) is not None:
                sent.append(self.runner.launch(*step))
            elif sent:
                scheduler.commit(sent.popleft().wait())
            if (news := scheduler.take_outbox()) is not None:
                for handle, token in zip(unpack(news.handles), unpack(news.tokens), strict=True):
                    outputs[handle].append(int(token))
        return outputs
