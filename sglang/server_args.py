"""The launch flags: one dataclass, from whose fields the command line is generated."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import random
from dataclasses import dataclass, field
from typing import Any, NoReturn, get_args, get_type_hints


def _flag(default: Any, help: str, *spellings: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with its help text; `spellings` are accepted beside --the-field-name."""
    metadata = {"help": help, "spellings": spellings, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ServerArgs:
    # Model
    model_path: str = _flag(
        "", "a local folder, a .gguf file or a hub id (default: the demo model)", "--model"
    )
    tokenizer_path: str | None = _flag(None, "where the tokenizer is, if not in the model path")
    skip_tokenizer_init: bool = _flag(False, "no tokenizer: requests and replies are token ids")
    load_format: str = _flag(
        "auto",
        "how weights are stored; dummy: random weights",
        choices=("auto", "safetensors", "pt", "gguf", "dummy"),
    )
    dtype: str = _flag(
        "auto",
        "of weights and activations",
        choices=("auto", "float16", "bfloat16", "float32"),
    )
    quantization: str | None = _flag(
        None,
        "fp8, int8: round the weights at load; gguf: a GGUF file's weights as stored, as by "
        "default on a CPU, unless --dtype float32; others: what the checkpoint must be",
        choices=(
            "fp8",
            "int8",
            "gguf",
            "awq",
            "gptq",
            "compressed-tensors",
            "fbgemm_fp8",
            "modelopt",
        ),
    )
    device: str = _flag("auto", "where the model runs", choices=("auto", "cuda", "cpu"))
    context_length: int | None = _flag(
        None, "longest prompt + output, in tokens (default: the model's)"
    )
    chat_template: str | None = _flag(None, "a Jinja file, or a template, instead of the model's")
    served_model_name: str | None = _flag(
        None, "the name in /v1/models and replies (default: the model path)"
    )
    trust_remote_code: bool = _flag(False, "let a checkpoint's own tokenizer code run")
    tp_size: int = _flag(1, "tensor-parallel ranks", "--tp", "--tensor-parallel-size")
    disable_custom_all_reduce: bool = _flag(
        False, "ranks exchange small tensors through NCCL too, not over symmetric memory"
    )
    check_ranks: bool = _flag(False, "compare the ranks' tokens at every step, for debugging")

    # HTTP
    host: str = _flag("127.0.0.1", "address to listen on")
    port: int = _flag(30000, "port to listen on; 0: any free one")
    api_key: str | None = _flag(None, "clients must send it: Authorization: Bearer <key>")
    allow_origins: list[str] = _flag([], "web origins that may call the server (CORS); * for all")
    max_queued_requests: int | None = _flag(
        None, "requests that wait for a seat at most; beyond: 503 (default: any number)"
    )
    max_body_mb: int = _flag(64, "size of a request's body at most, in MB")
    tool_call_parser: str = _flag(
        "hermes",
        "how the model writes tool calls",
        choices=("hermes", "llama3", "pythonic", "mistral"),
    )
    reasoning_parser: str | None = _flag(
        None,
        "tell <think>...</think> apart as reasoning_content; deepseek-r1: replies begin within it",
        choices=("deepseek-r1", "qwen3"),
    )
    grammar_backend: str = _flag(
        "llguidance",
        "what holds replies to a regex, json_schema or ebnf; none: refuse these",
        choices=("llguidance", "none"),
    )
    request_timeout: float | None = _flag(
        None, "seconds after which a request that still runs is ended with 504 (default: never)"
    )
    shutdown_timeout: float = _flag(
        5.0, "seconds that running requests have to end when the server is asked to"
    )
    log_level: str = _flag(
        "info", "least severe message to log", choices=("debug", "info", "warning", "error")
    )
    log_level_http: str | None = _flag(
        None,
        "the same for the access log, which is at info (default: as --log-level)",
        choices=("debug", "info", "warning", "error"),
    )
    log_requests: bool = _flag(False, "log every request when it comes and when it ends")
    log_requests_level: int = _flag(
        2,
        "0: counts and times; 1: also the sampling parameters; 2: also the beginnings of texts; "
        "3: whole texts",
    )

    # Memory and scheduling
    mem_fraction_static: float = _flag(
        0.88, "part of the GPU's memory for weights and KV cache together"
    )
    max_total_tokens: int | None = _flag(
        None, "KV slots (default: what mem-fraction-static leaves on a GPU, up to 32768 on a CPU)"
    )
    max_running_requests: int | None = _flag(
        None,
        "requests in a batch at most (default: 1024 on a GPU of 64 GB or more, 256 on others, 64 "
        "on a CPU)",
    )
    chunked_prefill_size: int | None = _flag(
        None,
        "new prompt tokens in a step at most (default: 8192 on a GPU, 16384 for models of less "
        "than a billion weights, 512 on a CPU)",
    )
    schedule_policy: str = _flag(
        "lpm",
        "which queued request goes next: longest prefix match, DFS weight, random, or first come "
        "first served",
        "--schedule-heuristic",
        choices=("lpm", "weight", "random", "fcfs"),
    )
    schedule_conservativeness: float = _flag(
        1.0, "above 1: admit fewer requests, preempt less; below 1: the opposite"
    )
    overlap_depth: int = _flag(
        2, "steps in flight between router and workers; 1: synchronous, for debugging"
    )
    disable_overlap_schedule: bool = _flag(False, "the same as --overlap-depth 1")
    random_seed: int | None = _flag(
        None, "seeds of requests that name none, reproducibly", "--seed"
    )

    # Attention and cache
    attention_backend: str = _flag(
        "auto",
        "auto: triton on a GPU, torch_native on a CPU; flashinfer: on a GPU, with the extra "
        "[flashinfer]",
        choices=("auto", "triton", "flashinfer", "torch_native"),
    )
    kv_cache_dtype: str = _flag(
        "auto",
        "auto: as the activations; fp8_e4m3: half the memory, on a GPU",
        choices=("auto", "fp8_e4m3"),
    )
    disable_cuda_graph: bool = _flag(False, "launch every kernel of a step by itself")
    cuda_graph_max_bs: int | None = _flag(
        None, "largest batch with a CUDA graph (default: max-running-requests)"
    )
    disable_radix_cache: bool = _flag(False, "forget every prefix when its request ends")
    model_mode: list[str] = _flag(
        [],
        "SGLang's older spelling of --disable-radix-cache and --attention-backend flashinfer",
        choices=("no-cache", "flashinfer"),
    )

    def __post_init__(self) -> None:
        if "no-cache" in self.model_mode:
            self.disable_radix_cache = True
        if "flashinfer" in self.model_mode:
            self.attention_backend = "flashinfer"
        if self.disable_overlap_schedule:
            self.overlap_depth = 1
        if self.random_seed is None:
            self.random_seed = random.randrange(2**31)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            values = value if isinstance(value, list) else [value]
            if f.metadata["choices"] and (bad := set(values) - {*f.metadata["choices"], f.default}):
                valid = ", ".join(f.metadata["choices"])
                raise ValueError(f"{flag_name(f.name)} is {bad.pop()!r}; there are: {valid}")
        for name, least in (("tp_size", 1), ("overlap_depth", 1), ("port", 0), ("max_body_mb", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{flag_name(name)} must be at least {least}")
        if self.port > 65535:
            raise ValueError("--port must be at most 65535")
        if self.log_requests_level not in range(4):
            raise ValueError("--log-requests-level must be 0, 1, 2 or 3")
        for name in ("request_timeout", "shutdown_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1e9:
                raise ValueError(f"{flag_name(name)} must be seconds >= 0")
        for name in (
            "context_length", "max_total_tokens", "max_running_requests", "chunked_prefill_size",
            "cuda_graph_max_bs",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_name(name)} must be at least 1")
        if not 0.0 < self.mem_fraction_static < 1.0:
            raise ValueError("--mem-fraction-static must be between 0 and 1")
        if not 0.0 <= self.schedule_conservativeness < 1e9:
            raise ValueError("--schedule-conservativeness must be a number >= 0")
        if self.max_queued_requests is not None and self.max_queued_requests < 0:
            raise ValueError("--max-queued-requests must not be negative")
        if self.api_key == "":
            raise ValueError("--api-key must not be empty: anybody could call the server")


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


_REPLICAS = "start a server for each replica"
_ONE_MACHINE = "a server runs on one machine"
_NOT_HERE = {
    "--data-parallel-size": _REPLICAS,
    "--dist-init-addr": _ONE_MACHINE,
    "--dp": _REPLICAS,
    "--dp-size": _REPLICAS,
    "--enable-cache-report": "leave it out: a reply's usage always names cached tokens",
    "--enable-metrics": "leave it out: /metrics is always there",
    "--enable-mixed-chunk": "leave it out: prefill and decoding always share steps",
    "--is-embedding": "leave it out: /v1/embeddings is always there",
    "--max-prefill-tokens": "see --chunked-prefill-size",
    "--nnodes": _ONE_MACHINE,
    "--node-rank": _ONE_MACHINE,
    "--page-size": "leave it out: slots for KV are single",
    "--revision": "download that revision, and name its folder as --model-path",
    "--skip-server-warmup": "leave it out: a server is ready when it says so",
    "--stream-interval": "leave it out: tokens are sent as they come",
    "--watchdog-timeout": "leave it out: a process that stands still is always noticed",
}
"""SGLang's flags that have no like here, and why."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, which names the valid flags or values."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help explains all flags)\n")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            valid = sorted(s for a in self._actions for s in a.option_strings if s.startswith("--"))
            close = difflib.get_close_matches(name, valid, n=1)
            hint = _NOT_HERE.get(name) or "".join(f"did you mean {flag}?" for flag in close)
            hint = f" ({hint})" if hint else ""
            self.error(f"unknown argument {unknown[0]}{hint}; valid flags: {' '.join(valid)}")
        return parsed


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ServerArgs."""
    types = get_type_hints(ServerArgs)
    for f in dataclasses.fields(ServerArgs):
        spellings = [flag_name(f.name), *f.metadata["spellings"]]
        choices = f.metadata["choices"] or None
        default = None if f.default is dataclasses.MISSING else f.default
        help = f.metadata["help"] + (
            "" if default in (None, "", False) else f" (default: {default})"
        )
        if types[f.name] is bool:
            parser.add_argument(*spellings, dest=f.name, action="store_true", help=help)
        elif f.default is dataclasses.MISSING:
            parser.add_argument(
                *spellings, dest=f.name, nargs="+", default=[], choices=choices, help=help
            )
        else:
            kinds = [t for t in get_args(types[f.name]) if t is not type(None)]
            parser.add_argument(
                *spellings,
                dest=f.name,
                type=kinds[0] if kinds else types[f.name],
                default=default,
                choices=choices,
                metavar=None if choices else f.name.rsplit("_", 1)[-1].upper(),
                help=help,
            )


def parse_args(argv: list[str] | None = None) -> ServerArgs:
    """Exits with code 2 and one clear line where a flag is unknown or a value is out of range."""
    parser = _Parser(
        prog="python -m sglang.launch_server",
        description="Serve a language model over the OpenAI API.",
        allow_abbrev=False,
    )
    add_cli_args(parser)
    namespace = parser.parse_args(argv)
    try:
        return ServerArgs(**vars(namespace))
    except ValueError as error:
        parser.error(str(error))
