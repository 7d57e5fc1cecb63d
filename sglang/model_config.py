"""What a model is: read from config.json or a GGUF header, before any weight is touched.

Every process is started with a ModelConfig; the router and the tokenizer manager want it without
torch, so nothing here imports torch or transformers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang import demo_model
from sglang.models.registry import check_architecture
from sglang.quantization.schemes import AT_LOAD, parse_scheme

if TYPE_CHECKING:
    from sglang.server_args import ServerArgs

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# By config.json's "model_type", and the architecture in a GGUF header.
_ARCHITECTURE_OF_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_WEIGHTS = {"safetensors": "*.safetensors", "pt": "*.bin", "gguf": "*.gguf"}


@dataclass
class ModelConfig:
    path: str
    """A local folder, or a .gguf file."""
    name: str
    """As it is served."""
    load_format: str
    """"safetensors", "pt", "gguf" or "dummy"."""
    device: str
    """"cuda" or "cpu"."""
    dtype: str
    """Of weights, activations and KV cache: "float32", "float16" or "bfloat16"."""
    context_len: int
    """Longest prompt + output, in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """With "rope_type": one of linear, llama3, yarn; None: plain RoPE."""
    sliding_window: int | None = None
    """A token sees this many, itself included, in layers from `first_window_layer` on."""
    first_window_layer: int = 0
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    default_sampling: dict[str, float] = field(default_factory=dict)
    """generation_config.json's values of the sampling parameters that it gives."""
    quantization_config: dict[str, Any] | None = None
    """The checkpoint's, as config.json has it, or the tool that quantized."""
    quantization: str | None = None
    """What becomes of its weights at load: "fp8" or "int8", or "gguf": they stay 4-bit."""

    @classmethod
    def load(cls, args: ServerArgs) -> ModelConfig:
        """Finds the model (fetching it, if need be) and reads its configuration.

        Raises ValueError, in one line, where there is no such model or it cannot be served.
        """
        path, name = _find_model(args)
        load_format, path = _find_weights(path, args.load_format)
        if path.suffix == ".gguf":
            values, generation = _read_gguf(path), {}
        else:
            values = _read_json(path / "config.json")
            generation = _read_json(path / "generation_config.json", required=False)
        config = cls.from_hf(values, generation)
        config.quantization_config = config.quantization_config or _of_quantizer(path)
        tokenizer = Path(args.tokenizer_path or path).expanduser()
        if tokenizer.is_dir():
            config.eos_token_ids = _ends(list(config.eos_token_ids), _tokenizer_end(tokenizer))
        config.path = str(path)
        config.name = args.served_model_name or name
        config.load_format = load_format
        config.device = resolve_device(args.device)
        config.dtype = _resolve_dtype(args.dtype, config.device, values)
        config._check_quantization(args)
        config._limit_context(args.context_length)
        config._check_parallel(args.tp_size)
        return config

    @classmethod
    def from_hf(
        cls, values: dict[str, Any], generation: dict[str, Any] | None = None
    ) -> ModelConfig:
        """From the contents of config.json and generation_config.json: a float32 model on the CPU
        with its full context, until `load` says otherwise."""
        try:
            return cls._from_hf(values, generation or {})
        except KeyError as error:
            raise ValueError(f"the model's configuration has no {error}") from None

    @classmethod
    def _from_hf(cls, values: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
        kind = values.get("model_type")
        named = values.get("architectures") or [_ARCHITECTURE_OF_TYPE.get(kind, kind)]
        architecture = named[0]
        check_architecture(architecture)
        if (act := values.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"the activation {act} is not supported; supported: silu")
        heads = values["num_attention_heads"]
        attention_bias = bool(values.get("attention_bias", False))
        theta, scaling = _rope(values)
        max_position = _max_position(values["max_position_embeddings"], scaling)
        window, first_window_layer = _sliding_window(values, architecture)
        quantization = values.get("quantization_config") or values.get("compression_config")
        return cls(
            path="",
            name="",
            load_format="dummy",
            device="cpu",
            dtype="float32",
            context_len=max_position,
            architecture=architecture,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            max_position_embeddings=max_position,
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=window,
            first_window_layer=first_window_layer,
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            o_bias=bool(values.get("attention_output_bias", attention_bias)),
            mlp_bias=bool(values.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            eos_token_ids=_ends(generation.get("eos_token_id"), values.get("eos_token_id")),
            bos_token_id=values.get("bos_token_id"),
            default_sampling={
                key: generation[key]
                for key in _SAMPLING_DEFAULTS
                if generation.get(key) is not None
            },
            quantization_config=quantization,
        )

    @property
    def weights_per_layer(self) -> int:
        """Elements of the matrices that every token is multiplied by."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    def window_of_layer(self, layer: int) -> int:
        """0: the layer sees everything before it."""
        return (self.sliding_window or 0) if layer >= self.first_window_layer else 0

    def _check_quantization(self, args: ServerArgs) -> None:
        asked, device = args.quantization, self.device
        if self.quantization_config is not None:
            scheme = parse_scheme(self.quantization_config)
            if asked not in (None, scheme.format):
                raise ValueError(f"--quantization {asked}: the checkpoint is {scheme.format}")
            return
        if asked in AT_LOAD:
            self.quantization = asked
        elif asked == "gguf":
            if self.load_format != "gguf" or device != "cpu":
                raise ValueError("--quantization gguf is for GGUF files on a CPU")
            self.quantization = asked
        elif asked is not None:
            raise ValueError(f"--quantization {asked}: the checkpoint is not quantized so")
        elif self.load_format == "gguf" and device == "cpu":
            self.quantization = None if args.dtype == "float32" else "gguf"

    def _limit_context(self, asked: int | None) -> None:
        if asked is not None and asked > self.max_position_embeddings:
            raise ValueError(
                f"--context-length {asked} is more than the model's {self.max_position_embeddings}"
            )
        self.context_len = asked or self.max_position_embeddings

    def _check_parallel(self, tp: int) -> None:
        if self.device == "cuda" and tp > (gpus := num_gpus()):
            raise ValueError(f"--tp-size {tp} needs {tp} GPUs: there are {gpus}")
        kv = self.num_kv_heads
        if self.num_heads % tp or self.intermediate_size % tp or (kv % tp and tp % kv):
            raise ValueError(
                f"--tp-size {tp} does not divide the model: {self.num_heads} attention heads, "
                f"{kv} KV heads, intermediate size {self.intermediate_size}"
            )


# --- finding the model ---------------------------------------------------------------------------


def _find_model(args: ServerArgs) -> tuple[Path, str]:
    """Its local path and the name under which it is served by default."""
    if not args.model_path:
        return demo_model.fetch(), demo_model.NAME
    path = Path(args.model_path).expanduser()
    if path.exists():
        return path, args.model_path
    return fetch_from_hub(args.model_path, weights=args.load_format != "dummy"), args.model_path


def fetch_from_hub(repo_id: str, weights: bool) -> Path:
    """The local copy of a hub repository's files that serving needs."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
        raise ValueError(f"there is no model at {repo_id}, and it is no hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
    unwanted = ["original/*", "consolidated*", "*/*"]
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=small, ignore_patterns=unwanted))
        for kind in ("*.safetensors", "*.bin") if weights else ():
            snapshot_download(repo_id, allow_patterns=kind, ignore_patterns=unwanted)
            if any(folder.glob(kind)):
                break
    except Exception as error:  # the hub client raises its own, requests' and the OS's errors
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"cannot get {repo_id} from the model hub ({type(error).__name__}: {reason}); "
            "a local folder or .gguf file works offline"
        ) from None
    return folder


def _find_weights(path: Path, load_format: str) -> tuple[str, Path]:
    """The load format, resolved, and where the configuration is: a folder or a .gguf file."""
    if path.is_file():
        if path.suffix != ".gguf" or load_format not in ("auto", "gguf", "dummy"):
            raise ValueError(f"{path} is a file: only .gguf files can be served as such")
        return ("dummy" if load_format == "dummy" else "gguf"), path
    if load_format == "dummy":
        return load_format, path
    for kind, pattern in _WEIGHTS.items():
        files = sorted(path.glob(pattern)) if load_format in ("auto", kind) else []
        if files and kind != "gguf":
            return kind, path
        if len(files) == 1:
            return kind, files[0]
        if files:
            raise ValueError(f"{path} has several .gguf files: name one, such as {files[0]}")
    wanted = " or ".join(_WEIGHTS.values() if load_format == "auto" else [_WEIGHTS[load_format]])
    raise ValueError(f"{path} has no weights ({wanted})")


def resolve_device(device: str) -> str:
    """ "auto" is "cuda" where a GPU's driver and a CUDA build of torch are, else "cpu". Importing
    torch to ask it would cost seconds of a start."""
    if device != "auto":
        return device
    torch = importlib.util.find_spec("torch")
    if torch is None or not list(Path(torch.origin or "").parent.glob("lib/*torch_cuda.*")):
        return "cpu"
    return "cuda" if num_gpus() else "cpu"


def num_gpus() -> int:
    """Those that CUDA_VISIBLE_DEVICES leaves; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def _resolve_dtype(asked: str, device: str, values: dict[str, Any]) -> str:
    if asked != "auto":
        return asked
    if device == "cpu":
        return "float32"
    stored = values.get("dtype") or values.get("torch_dtype")
    # A float32 checkpoint may have activations beyond float16's range; bfloat16 has them all.
    return "float16" if stored == "float16" else "bfloat16"


# --- reading its configuration -------------------------------------------------------------------


def _read_json(path: Path, required: bool = True) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # of a .gguf file
        if required:
            raise ValueError(f"{path.parent} has no {path.name}") from None
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def _of_quantizer(folder: Path) -> dict[str, Any] | None:
    """What older versions of AutoGPTQ and AutoAWQ, and NVIDIA's, say in files of their own."""
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if values := _read_json(folder / name, required=False):
            return values
    return None


def _rope(values: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) of either spelling: rope_theta + rope_scaling, or rope_parameters."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or values.get("rope_theta") or 10000.0)
    kind = rope.pop("type", None)
    kind = rope.setdefault("rope_type", kind or "default")
    if kind not in _ROPE_TYPES:
        raise ValueError(
            f"RoPE scaling of type {kind} is not supported; supported: {', '.join(_ROPE_TYPES)}"
        )
    if (rotated := rope.pop("partial_rotary_factor", None) or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {rotated} is not supported; supported: 1.0")
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    return theta, rope if kind != "default" else None


def _max_position(trained: int, scaling: dict[str, Any] | None) -> int:
    """Configurations state the length before "linear" and "yarn" stretch it."""
    if scaling is None or scaling["rope_type"] not in ("linear", "yarn"):
        return trained
    original = scaling.get("original_max_position_embeddings") or trained
    return max(trained, int(original * scaling["factor"]))


def _sliding_window(values: dict[str, Any], architecture: str) -> tuple[int | None, int]:
    """(window or None, the first layer that has it)."""
    window = values.get("sliding_window")
    if architecture == "MistralForCausalLM":
        return window, 0
    if not architecture.startswith("Qwen") or not values.get("use_sliding_window"):
        return None, 0
    return window, values.get("max_window_layers", 0)


def _read_gguf(path: Path) -> dict[str, Any]:
    """A GGUF header in the words of config.json."""
    from sglang.models.gguf import GGUFFile

    file = GGUFFile(path)
    kind = file.metadata.get("general.architecture")
    if kind not in _ARCHITECTURE_OF_TYPE:
        raise ValueError(
            f"{path}: the GGUF architecture {kind} is not supported; supported: "
            + ", ".join(_ARCHITECTURE_OF_TYPE)
        )

    def value(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{kind}.{key}", default)

    try:
        hidden, heads = value("embedding_length"), value("attention.head_count")
        rope: dict[str, Any] = {"rope_theta": value("rope.freq_base", 10000.0)}
        if value("rope.scaling.type", "none") != "none":
            rope["rope_type"] = value("rope.scaling.type")
            rope["factor"] = value("rope.scaling.factor")
            if original := value("rope.scaling.original_context_length"):
                rope["original_max_position_embeddings"] = original
        return {
            "architectures": [_ARCHITECTURE_OF_TYPE[kind]],
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": value("attention.head_count_kv", heads),
            "head_dim": value("attention.key_length", hidden // heads),
            "max_position_embeddings": value("context_length"),
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_parameters": rope,
            "dtype": _gguf_dtype({tensor.type for tensor in file.tensors.values()}),
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "attention_output_bias": "blk.0.attn_output.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
            "eos_token_id": _gguf_ends(file.metadata),
            "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its header lacks what {kind} needs ({error})") from None


def _gguf_dtype(types: set[str]) -> str:
    """What a file's numbers are held in where 16 bits are wanted. Blocks have float16 scales, and
    bfloat16 rounds so much more that greedy answers of a small model change."""
    return "bfloat16" if "BF16" in types or types == {"F32"} else "float16"


def _ends(*ids: int | list[int] | None) -> tuple[int, ...]:
    """Whatever one file says ends a reply: often they differ, and one is older."""
    lists = [each if isinstance(each, list) else [] if each is None else [each] for each in ids]
    return tuple(dict.fromkeys(id for each in lists for id in each))


def _tokenizer_end(folder: Path) -> int | None:
    """What a tokenizer calls the end of a sequence, as SGLang looks at it, too: who teaches a model
    another format of chats may change it there alone."""
    config = _read_json(folder / "tokenizer_config.json", required=False)
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end is None:
        return None
    ids = {
        token.get("content"): int(id)
        for id, token in config.get("added_tokens_decoder", {}).items()
    }
    if end not in ids:
        tokenizer = _read_json(folder / "tokenizer.json", required=False)
        ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    return ids.get(end)


_GGUF_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")


def _gguf_ends(metadata: dict[str, Any]) -> list[int]:
    """Ends of sequence, turn and message; where their keys are missing, by the tokens' names."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = [metadata[key] for key in keys if key in metadata]
    tokens = list(metadata.get("tokenizer.ggml.tokens", ()))
    ids += [tokens.index(name) for name in _GGUF_ENDS if name in tokens]
    return list(dict.fromkeys(ids))
