"""Applies plans to tensors: one model on one device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang.attention import create_attention_backend
from sglang.messages import StepPlan, StepResult, pack
from sglang.model_config import ModelConfig
from sglang.models.checkpoint import open_checkpoint
from sglang.models.registry import build_model
from sglang.server_args import ServerArgs
from sglang.worker.batch import Batch
from sglang.worker.graphs import DecodeGraphs, DecodeInputs, DecodeOutputs
from sglang.worker.kv_pool import KVPool, num_slots_that_fit
from sglang.worker.parallel import TensorParallel
from sglang.worker.rows import RowState, StepArrays
from sglang.worker.sampler import RowLogprobs, Sampler, draw


@dataclass
class PendingStep:
    """A step that was launched; its tokens are on their way to the host."""

    step: int
    tokens: torch.Tensor  # int32 [s], host memory
    logprobs: RowLogprobs | None
    copied: torch.cuda.Event | None  # None: they are there

    def wait(self) -> StepResult:
        if self.copied is not None:
            self.copied.synchronize()
        logprobs = self.logprobs.messages() if self.logprobs is not None else []
        return StepResult(self.step, pack(self.tokens.numpy()), logprobs)


@dataclass
class Limits:
    """What depends on the device and was not given by a flag."""

    max_running_requests: int
    chunked_prefill_size: int
    max_total_tokens: int | None
    """None: as many as fit."""

    @classmethod
    def of(cls, args: ServerArgs, device: torch.device) -> Limits:
        rows, chunk, slots = (256, 8192, None) if device.type == "cuda" else (64, 512, 32768)
        return cls(
            args.max_running_requests or rows,
            args.chunked_prefill_size or chunk,
            args.max_total_tokens or slots,
        )


class ModelRunner:
    """`launch` never waits for the device: it enqueues a step, behind those before it, and returns
    what will hold its tokens."""

    def __init__(self, args: ServerArgs, config: ModelConfig, tp: TensorParallel) -> None:
        self.device = torch.device(config.device, tp.rank if config.device == "cuda" else None)
        limits = Limits.of(args, self.device)
        dtype = getattr(torch, config.dtype)

        # Weights
        self.model = build_model(
            config, tp, self.device, open_checkpoint(config, config.load_format)
        )

        # KV pool: what the weights leave
        shape = (self.model.num_layers, self.model.num_kv_heads_per_rank, self.model.head_dim)
        fits = num_slots_that_fit(
            KVPool.bytes_per_slot(*shape, dtype), self.device, args.mem_fraction_static
        )
        num_slots = min(fits, limits.max_total_tokens or fits)
        if num_slots < 1:
            raise ValueError(
                "the weights leave no memory for a KV cache: see --mem-fraction-static"
            )
        self.kv_cache = KVPool(num_slots, *shape, dtype, self.device)

        # State of the rows
        num_rows = min(limits.max_running_requests, num_slots)
        self.chunk_size = limits.chunked_prefill_size
        self.rows = RowState(num_rows, config.context_len, self.device)
        self.sampler = Sampler(num_rows, config.vocab_size, self.device)
        self.attention = create_attention_backend(args.attention_backend, self.device)

        # CUDA graphs
        self.graphs = None
        if self.device.type == "cuda" and not args.disable_cuda_graph:
            largest = min(args.cuda_graph_max_bs or num_rows, num_rows)
            self.graphs = DecodeGraphs(self._decode, self.rows, largest, tp.rank == 0)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, payload: bytes) -> PendingStep:
        step = self.rows.advance(plan, payload)
        for spec in plan.opened:
            self.sampler.open(spec)
        tokens, logprobs = self._forward(step)
        return self._send_home(plan.step, tokens, logprobs)

    def _forward(self, step: StepArrays) -> tuple[torch.Tensor, RowLogprobs | None]:
        if self.graphs is not None and self.graphs.fit(step):
            return self._replay(self.graphs, step)
        batch, sample_at, sample_rows, sample_positions = self._upload(step)
        self.attention.begin(batch)
        hidden = self.model.forward(batch.input_ids, batch.positions, batch)
        if len(step.sample_at) == 0:
            return sample_rows, None
        if len(step.sample_at) < len(hidden):
            hidden = hidden.index_select(0, sample_at)
        tokens, logprobs = self.sampler(
            self.model.logits(hidden),
            step.rows[step.sample_of],
            step.kv_lens[step.sample_of],
            self.rows.params.index_select(1, sample_rows),
            sample_positions,
        )
        self.rows.last_token.index_copy_(0, sample_rows.long(), tokens)
        return tokens, logprobs

    def _replay(
        self, graphs: DecodeGraphs, step: StepArrays
    ) -> tuple[torch.Tensor, RowLogprobs | None]:
        n = len(step.rows)
        inputs, outputs = graphs.replay(step)
        if self.sampler.is_plain(step.rows):
            return outputs.tokens[:n], None
        rows = inputs.rows[:n]  # their tokens take the place of those that the graph drew
        tokens, logprobs = self.sampler(
            outputs.logits[:n],
            step.rows,
            step.kv_lens,
            self.rows.params.index_select(1, rows),
            inputs.kv_lens[:n],
        )
        self.rows.last_token.index_copy_(0, rows.long(), tokens)
        return tokens, logprobs

    @torch.inference_mode()
    def _decode(self, inputs: DecodeInputs) -> DecodeOutputs:
        """A decode step by what is on the device alone, for a graph."""
        rows = self.rows
        rows.slot_table.view(-1).index_copy_(0, inputs.grown_at.long(), inputs.slots)
        batch = Batch(
            num_decode=len(inputs.rows),
            input_ids=rows.last_token.index_select(0, inputs.rows),
            positions=inputs.positions,
            slots=inputs.slots,
            rows=inputs.rows,
            kv_lens=inputs.kv_lens,
            slot_table=rows.slot_table,
            q_starts=inputs.rows[:1],
            max_kv_len=rows.max_len,
            attention=self.attention,
            kv_cache=self.kv_cache,
        )
        self.attention.begin(batch)
        logits = self.model.logits(self.model.forward(batch.input_ids, batch.positions, batch))
        tokens = draw(logits, rows.params.index_select(1, inputs.rows), inputs.kv_lens)
        rows.last_token.index_copy_(0, inputs.rows.long(), tokens)
        return DecodeOutputs(logits, tokens)

    def _upload(self, step: StepArrays) -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One copy to the device; then the row state takes in what is new."""
        d, rows = step.num_decode, self.rows
        q_starts = np.zeros(len(step.rows) - d + 1, dtype=np.int32)
        np.cumsum(step.q_lens[d:], out=q_starts[1:])
        (
            row_ids, kv_lens, positions, slots, prefill_ids, starts, sample_at, sample_rows,
            sample_positions, grown_at, grown_slots, opened, params,
        ) = self._to_device(
            step.rows, step.kv_lens, step.positions, step.slots, step.prefill_ids, q_starts,
            step.sample_at, step.rows[step.sample_of], step.kv_lens[step.sample_of],
            step.grown_at, step.grown_slots, step.opened, step.params.reshape(-1),
        )  # fmt: skip
        if len(step.opened):
            rows.params.index_copy_(1, opened.long(), params.view(step.params.shape))
        rows.slot_table.view(-1).index_copy_(0, grown_at.long(), grown_slots)
        input_ids = prefill_ids
        if d > 0:
            decode_ids = rows.last_token.index_select(0, row_ids[:d])
            input_ids = torch.cat([decode_ids, prefill_ids]) if len(prefill_ids) else decode_ids
        batch = Batch(
            num_decode=d,
            input_ids=input_ids,
            positions=positions,
            slots=slots,
            rows=row_ids,
            kv_lens=kv_lens,
            slot_table=rows.slot_table,
            q_starts=starts,
            max_kv_len=int(step.kv_lens.max()),
            attention=self.attention,
            kv_cache=self.kv_cache,
            q_lens_host=step.q_lens,
            kv_lens_host=step.kv_lens,
        )
        return batch, sample_at, sample_rows, sample_positions

    def _to_device(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """int32 arrays -> views of one tensor on the device."""
        sizes = [len(array) for array in arrays]
        # A fresh buffer: an earlier one may still be in a copy. The allocator reuses it after that.
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        np.concatenate(arrays, out=host.numpy())
        return host.to(self.device, non_blocking=True).split(sizes)

    def _send_home(
        self, step: int, tokens: torch.Tensor, logprobs: RowLogprobs | None
    ) -> PendingStep:
        if self.device.type != "cuda":
            return PendingStep(step, tokens, logprobs, None)

        def to_host(x: torch.Tensor) -> torch.Tensor:
            pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            return pinned.copy_(x, non_blocking=True)

        if logprobs is not None:
            logprobs = replace(
                logprobs,
                chosen=to_host(logprobs.chosen),
                top=to_host(logprobs.top),
                top_ids=to_host(logprobs.top_ids),
            )
        tokens = to_host(tokens)
        copied = torch.cuda.Event()
        copied.record()
        return PendingStep(step, tokens, logprobs, copied)
