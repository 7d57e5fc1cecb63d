"""Applies plans to tensors: one model on one device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang.attention import AttentionShape, create_attention_backend
from sglang.messages import RowSpec, StepPlan, StepResult, pack
from sglang.model_config import ModelConfig
from sglang.models.checkpoint import open_checkpoint
from sglang.models.registry import build_model
from sglang.server_args import ServerArgs
from sglang.worker.batch import Batch
from sglang.worker.compile_ahead import compile_ahead
from sglang.worker.embeddings import PooledRow, Pooler
from sglang.worker.graphs import (
    DecodeInputs,
    GraphOutputs,
    PrefillInputs,
    StepGraphs,
    longest_worthwhile,
)
from sglang.worker.kv_pool import KVPool, num_slots_that_fit
from sglang.worker.parallel import TensorParallel
from sglang.worker.prompt_logprobs import PromptScorer, ScoredSpan
from sglang.worker.rows import NUM_PARAMS, RowState, StepArrays
from sglang.worker.sampler import Masks, RowLogprobs, Sampler, draw
from sglang.worker.staging import Berth, Berths
from sglang.worker.warm_up import warm_up

logger = logging.getLogger(__name__)


@dataclass
class PendingStep:
    """A step that was launched; its tokens are on their way to the host."""

    step: int
    tokens: Callable[[], np.ndarray]
    """Waits for them, and for all the rest, which is in host memory too: int32."""
    wanted: np.ndarray | None  # which of them; None: all
    logprobs: RowLogprobs | None = None
    prompts: Sequence[ScoredSpan] = ()
    pooled: Sequence[PooledRow] = ()

    def wait(self) -> StepResult:
        """To be called once."""
        tokens = self.tokens()
        return StepResult(
            self.step,
            pack(tokens if self.wanted is None else tokens[self.wanted]),
            self.logprobs.messages() if self.logprobs is not None else [],
            [span.message() for span in self.prompts],
            [row.message() for row in self.pooled],
        )


@dataclass
class Limits:
    """What depends on the device and was not given by a flag."""

    max_running_requests: int
    chunked_prefill_size: int
    max_total_tokens: int | None
    """None: as many as fit."""

    @classmethod
    def of(cls, args: ServerArgs, config: ModelConfig, device: torch.device) -> Limits:
        rows, chunk, slots = 64, 512, 32768
        if device.type == "cuda":
            # Each CUDA graph keeps the logits of its rows.
            has_room = torch.cuda.get_device_properties(device).total_memory >= 64 << 30
            # Long steps are quicker in all, but those who are decoding wait for them.
            is_small = config.weights_per_layer * config.num_layers < 1e9
            rows, chunk, slots = 1024 if has_room else 256, 16384 if is_small else 8192, None
        return cls(
            args.max_running_requests or rows,
            args.chunked_prefill_size or chunk,
            args.max_total_tokens or slots,
        )


def kv_dtype(flag: str, model_dtype: str, device: torch.device) -> torch.dtype:
    """Of the KV cache. Raises ValueError where the device has no kernels for it."""
    if flag == "auto":
        return getattr(torch, model_dtype)
    if device.type != "cuda":
        raise ValueError(f"--kv-cache-dtype {flag} needs a GPU")
    return torch.float8_e4m3fn


class ModelRunner:
    """`launch` never waits for the device: it enqueues a step, behind those before it, and returns
    what will give its tokens. No gradients are asked for; torch's inference mode, which saves a
    little time, is the caller's to enter."""

    def __init__(self, args: ServerArgs, config: ModelConfig, tp: TensorParallel) -> None:
        self.device = torch.device(config.device, tp.rank if config.device == "cuda" else None)
        self.tp = tp
        self.checks_ranks = args.check_ranks
        limits = Limits.of(args, config, self.device)
        dtype = kv_dtype(args.kv_cache_dtype, config.dtype, self.device)
        self.attention = create_attention_backend(
            args.attention_backend,
            self.device,
            AttentionShape.of(config, tp, dtype, limits.max_running_requests),
        )

        # Weights
        self.model = build_model(
            config, tp, self.device, open_checkpoint(config, config.load_format)
        )
        if self.device.type == "cuda":
            logger.info("weights take %.2f GB", torch.cuda.memory_allocated(self.device) / 1e9)

        # KV pool: what the weights leave
        shape = (self.model.num_layers, self.model.num_kv_heads_per_rank, self.model.head_dim)
        bytes_per_slot = KVPool.bytes_per_slot(*shape, dtype)
        fits = num_slots_that_fit(bytes_per_slot, self.device, args.mem_fraction_static)
        num_slots = tp.least(min(fits, limits.max_total_tokens or fits))
        if num_slots < 1:
            raise ValueError(
                "the weights leave no memory for a KV cache: see --mem-fraction-static"
            )
        self.kv_cache = KVPool(num_slots, *shape, dtype, self.device)
        logger.info("KV cache: %d tokens, %.2f GB", num_slots, num_slots * bytes_per_slot / 1e9)

        # State of the rows
        num_rows = min(limits.max_running_requests, num_slots)
        self.chunk_size = limits.chunked_prefill_size
        self.rows = RowState(num_rows, config.context_len, self.device)
        self.sampler = Sampler(num_rows, config.vocab_size, self.device, sharded=tp.size > 1)
        self.prompt_scorer, self.pooler = PromptScorer(), Pooler()
        self._berths = Berths(num_rows, pinned=self.device.type == "cuda")

        # CUDA graphs
        self.graphs = None
        if self.device.type == "cuda" and not args.disable_cuda_graph:
            self.graphs = StepGraphs(
                self._decode,
                self._prefill,
                self.attention,
                self.rows,
                max_rows=min(args.cuda_graph_max_bs or num_rows, num_rows),
                max_tokens=min(
                    self.chunk_size + num_rows,
                    longest_worthwhile(config.weights_per_layer // tp.size),
                ),
            )
            show_progress = tp.rank == 0
            compile_ahead(self._rehearse, show_progress)
            self.graphs.capture(show_progress)
        warm_up(self)

    def launch(self, plan: StepPlan, payload: bytes) -> PendingStep:
        step = self.rows.advance(plan, payload)
        if plan.opened:
            self._open(plan.opened, step)
        scored, pooled = self.prompt_scorer.spans(step), self.pooler.spans(step)
        graphs = None if scored or pooled else self.graphs  # a graph has no hidden states
        berth = self._berths.take()
        outputs = graphs.replay(step, berth) if graphs is not None else None
        if outputs is None:
            tokens, logprobs, hidden = self._run(step, of_all_tokens=bool(scored or pooled))
            return self._send_home(
                plan.step,
                berth,
                tokens,
                logprobs,
                prompts=[span.score(hidden, self.model.logits) for span in scored],
                pooled=self.pooler.pool(pooled, hidden),
            )
        if self.sampler.is_plain(step.rows) and not plan.masked:
            return self._send_home(plan.step, berth, outputs.tokens, None, step.sample_of)
        tokens, logprobs = self._sample_again(step, outputs)
        return self._send_home(plan.step, berth, tokens, logprobs)

    def _open(self, specs: list[RowSpec], step: StepArrays) -> None:
        """Rows get the slots of their cached prefixes, and tell what they want."""
        for spec in specs:
            self.sampler.open(spec)
            self.prompt_scorer.open(spec)
            self.pooler.open(spec)
        if len(step.cached_at):
            cached_at, slots = self._to_device(step.cached_at, step.cached_slots)
            self.rows.slot_table.view(-1).index_copy_(0, cached_at.long(), slots)

    def _run(
        self, step: StepArrays, of_all_tokens: bool
    ) -> tuple[torch.Tensor, RowLogprobs | None, torch.Tensor]:
        """A step without a graph -> (tokens, logprobs, hidden states of all tokens or of each row's
        last)."""
        d, rows = step.num_decode, self.rows
        starts = np.zeros(len(step.rows) - d + 1, dtype=np.int32)
        np.cumsum(step.q_lens[d:], out=starts[1:])
        sampled = step.rows[step.sample_of]
        sampled_lens = step.kv_lens[step.sample_of]
        last_at = step.q_lens.cumsum(dtype=np.int32) - 1
        sample_at = step.sample_at if of_all_tokens else step.sample_of
        (
            row_ids, kv_lens, positions, slots, prefill_ids, q_starts, grown_at, last,
            sample_at, sample_rows, sample_positions, params,
        ) = self._to_device(
            step.rows, step.kv_lens, step.positions, step.slots, step.prefill_ids, starts,
            step.grown_at, last_at, sample_at, sampled, sampled_lens,
            step.params[:, step.sample_of].reshape(-1),
        )  # fmt: skip
        rows.slot_table.view(-1).index_copy_(0, grown_at.long(), slots)
        input_ids = prefill_ids
        if d > 0:
            decode_ids = rows.last_token.index_select(0, row_ids[:d])
            input_ids = torch.cat([decode_ids, prefill_ids]) if len(prefill_ids) else decode_ids
        hidden = self._forward(
            Batch(
                num_decode=d,
                input_ids=input_ids,
                positions=positions,
                slots=slots,
                rows=row_ids,
                kv_lens=kv_lens,
                slot_table=rows.slot_table,
                q_starts=q_starts,
                max_kv_len=int(step.kv_lens.max()),
                max_q_len=int(step.q_lens.max()),
                attention=self.attention,
                kv_cache=self.kv_cache,
                last=None if of_all_tokens or d == len(last_at) else last,
                q_lens_host=step.q_lens,
                kv_lens_host=step.kv_lens,
            )
        )
        if len(sampled) == 0:
            return sample_rows, None, hidden
        params = params.view(NUM_PARAMS, -1)
        head, logprobs = self.model.lm_head, None
        logits = head(hidden if len(sampled) == len(hidden) else hidden.index_select(0, sample_at))
        if self.sampler.is_plain(sampled) and len(step.masked) == 0:
            tokens = draw(logits, head, params, sample_positions)
        else:
            tokens, logprobs = self.sampler(
                head.gather(logits), sampled, sampled_lens, params, sample_positions,
                self._masks(step),
            )  # fmt: skip
        rows.last_token.index_copy_(0, sample_rows.long(), tokens)
        return tokens, logprobs, hidden

    def _masks(self, step: StepArrays) -> Masks | None:
        if len(step.masked) == 0:
            return None
        masked, words = self._to_device(step.masked, step.masks.reshape(-1))
        return Masks(masked, words.view(step.masks.shape))

    def _forward(self, batch: Batch) -> torch.Tensor:
        self.attention.begin(batch)
        return self.model.forward(batch.input_ids, batch.positions, batch)

    # --- steps in graphs -------------------------------------------------------------------------

    def _rehearse(self) -> None:
        """All steps that will be captured, through few of the layers: kernels differ only by what
        is before and after a layer, and by its window."""
        assert self.graphs is not None
        layers = self.model.layers
        self.model.layers = torch.nn.ModuleList([*layers[:2], *layers[-1:]])
        try:
            self.graphs.rehearse()
        finally:
            self.model.layers = layers

    @torch.inference_mode()
    def _decode(self, inputs: DecodeInputs) -> GraphOutputs:
        """One new token for each row."""
        rows = self.rows
        rows.slot_table.view(-1).index_copy_(0, inputs.grown_at.long(), inputs.slots)
        hidden = self._forward(
            Batch(
                num_decode=len(inputs.rows),
                input_ids=rows.last_token.index_select(0, inputs.rows),
                positions=inputs.positions,
                slots=inputs.slots,
                rows=inputs.rows,
                kv_lens=inputs.kv_lens,
                slot_table=rows.slot_table,
                q_starts=inputs.rows[:1],  # no prefill rows
                max_kv_len=rows.max_len,
                max_q_len=1,
                attention=self.attention,
                kv_cache=self.kv_cache,
            )
        )
        return self._draw(hidden, inputs.rows, inputs.kv_lens, inputs.params)

    @torch.inference_mode()
    def _prefill(self, inputs: PrefillInputs, max_q_len: int) -> GraphOutputs:
        """Rows that prefill. If any may decode instead, the device is told which."""
        rows, ids, kv_lens = self.rows, inputs.ids, inputs.kv_lens
        rows.slot_table.view(-1).index_copy_(0, inputs.grown_at.long(), inputs.slots)
        if inputs.decode_lens is not None:
            ids = torch.where(ids < 0, rows.last_token.index_select(0, inputs.owners), ids)
            kv_lens = kv_lens - inputs.decode_lens
        hidden = self._forward(
            Batch(
                num_decode=0,
                input_ids=ids,
                positions=inputs.positions,
                slots=inputs.slots,
                rows=inputs.rows,
                kv_lens=kv_lens,
                decode_lens=inputs.decode_lens,
                slot_table=rows.slot_table,
                q_starts=inputs.q_starts,
                max_kv_len=rows.max_len,
                max_q_len=min(max_q_len, len(ids)),
                attention=self.attention,
                kv_cache=self.kv_cache,
                last=inputs.last,
            )
        )
        return self._draw(hidden, inputs.rows, inputs.kv_lens, inputs.params)

    def _draw(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        kv_lens: torch.Tensor,
        params: torch.Tensor,
    ) -> GraphOutputs:
        """A token for each row. What a row draws in the midst of its prompt is never used."""
        head = self.model.lm_head
        logits = head(hidden)
        tokens = draw(logits, head, params.view(NUM_PARAMS, -1), kv_lens)
        self.rows.last_token.index_copy_(0, rows.long(), tokens)
        return GraphOutputs(logits, tokens)

    def _sample_again(
        self, step: StepArrays, outputs: GraphOutputs
    ) -> tuple[torch.Tensor, RowLogprobs | None]:
        """Some rows ask for more than a graph does: draw from its logits anew."""
        sampled, lens = step.rows[step.sample_of], step.kv_lens[step.sample_of]
        at, rows, positions, params = self._to_device(
            step.sample_of, sampled, lens, step.params[:, step.sample_of].reshape(-1)
        )
        tokens, logprobs = self.sampler(
            self.model.lm_head.gather(outputs.logits.index_select(0, at)),
            sampled,
            lens,
            params.view(NUM_PARAMS, -1),
            positions,
            self._masks(step),
        )
        self.rows.last_token.index_copy_(0, rows.long(), tokens)
        return tokens, logprobs

    # --- to the device and back ------------------------------------------------------------------

    def _to_device(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """int32 arrays -> views of one tensor on the device."""
        sizes = [len(array) for array in arrays]
        # A fresh buffer: an earlier one may still be in a copy. The allocator reuses it after that.
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        np.concatenate(arrays, out=host.numpy())
        return host.to(self.device, non_blocking=True).split(sizes)

    def _send_home(
        self,
        step: int,
        berth: Berth,
        tokens: torch.Tensor,
        logprobs: RowLogprobs | None,
        wanted: np.ndarray | None = None,
        prompts: Sequence[ScoredSpan] = (),
        pooled: Sequence[PooledRow] = (),
    ) -> PendingStep:
        """wanted: which of the tokens; None: all."""
        if self.checks_ranks:
            self.tp.assert_same(tokens if wanted is None else tokens[wanted.tolist()])

        def to_host(x: torch.Tensor) -> torch.Tensor:
            if x.is_cpu:
                return x
            pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            return pinned.copy_(x, non_blocking=True)

        if logprobs is not None:
            logprobs = replace(
                logprobs,
                chosen=to_host(logprobs.chosen),
                top=to_host(logprobs.top),
                top_ids=to_host(logprobs.top_ids),
            )
        prompts = [span.map(to_host) for span in prompts]
        pooled = [row.map(to_host) for row in pooled]
        arriving = berth.fetch(tokens)
        return PendingStep(step, arriving, wanted, logprobs, prompts, pooled)
