"""Ranks hold shares that make up the whole, and together compute what one rank does."""

from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp

from sglang.layers.shard import Shard
from sglang.model_config import ModelConfig
from sglang.models.checkpoint import SafetensorsCheckpoint, open_checkpoint
from sglang.models.decoder import DecoderLayer
from sglang.models.registry import build_model
from sglang.quantization.unquantized import Unquantized
from sglang.server_args import ServerArgs
from sglang.worker.parallel import TensorParallel
from tests.models import tiny


def build(path, tp: TensorParallel, dtype: str = "float32"):
    args = ServerArgs(model_path=str(path), device="cpu", dtype=dtype, tp_size=tp.size)
    config = ModelConfig.load(args)
    return build_model(config, tp, tiny.CPU, open_checkpoint(config))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_shares_concatenated_are_the_whole(file, size, tmp_path):
    model = tiny.make("Qwen2", num_key_value_heads=2)  # with 4 ranks, two share a KV head
    if file == "bin":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path)
    model = model.half()
    # float16, whose weights the CPU keeps as they are.
    ranks = [build(tmp_path, TensorParallel(rank, size), "float16") for rank in range(size)]
    theirs, ours = model.model.layers[1], [rank.layers[1] for rank in ranks]
    head_dim, kv_ranks = 16, min(size, 2)

    def whole(parts, dim=0):
        return torch.cat(list(parts), dim)

    for kind in ("weight", "bias"):
        q, kv = 4 // size * head_dim, 2 // kv_ranks * head_dim
        split = [getattr(rank.self_attn.qkv_proj, kind).split([q, kv, kv]) for rank in ours]
        theirs_of = {x: getattr(getattr(theirs.self_attn, f"{x}_proj"), kind) for x in "qkv"}
        assert torch.equal(whole(s[0] for s in split), theirs_of["q"])
        assert torch.equal(whole(s[1] for s in split[:: size // kv_ranks]), theirs_of["k"])
        assert torch.equal(whole(s[2] for s in split[:: size // kv_ranks]), theirs_of["v"])
        if size > kv_ranks:
            assert torch.equal(split[0][1], split[1][1])
    gate_up = [rank.mlp.gate_up_proj.weight.chunk(2) for rank in ours]
    assert torch.equal(whole(g for g, _ in gate_up), theirs.mlp.gate_proj.weight)
    assert torch.equal(whole(u for _, u in gate_up), theirs.mlp.up_proj.weight)
    down = whole((rank.mlp.down_proj.weight for rank in ours), 1)
    assert torch.equal(down, theirs.mlp.down_proj.weight)
    for part in (rank.embed_tokens.weight for rank in ranks):
        assert len(part) == -(-99 // size)
    embedding = whole(rank.embed_tokens.weight for rank in ranks)
    assert torch.equal(embedding[:99], model.model.embed_tokens.weight)
    assert not embedding[99:].any()
    head = whole(rank.lm_head.weight for rank in ranks)
    assert torch.equal(head[:99], model.lm_head.weight)


def test_ranks_read_their_shares_and_no_more(tmp_path, monkeypatch):
    tiny.make("Qwen2", num_key_value_heads=2).save_pretrained(tmp_path)
    sizes: dict[str, list[int]] = {}

    def read(self, out, name, index, original=SafetensorsCheckpoint._read):
        sizes.setdefault(name, []).append(out.numel())
        original(self, out, name, index)

    monkeypatch.setattr(SafetensorsCheckpoint, "_read", read)
    build(tmp_path, TensorParallel())
    whole = {name: size for name, (size,) in sizes.items()}
    sizes.clear()
    for rank in range(4):
        build(tmp_path, TensorParallel(rank, 4))
    assert sizes.keys() == whole.keys()
    for name, of_ranks in sizes.items():
        copies = 4 if "norm" in name else 2 if "k_proj" in name or "v_proj" in name else 1
        assert sum(of_ranks) == copies * whole[name], name


def test_shares_of_a_gguf_file_are_those_of_its_whole_layers():
    """The demo model: nine heads, whose rows such a file keeps in another order, on three ranks."""
    config = ModelConfig.load(ServerArgs(device="cpu", dtype="float16", tp_size=3))

    def layer(tp: TensorParallel) -> DecoderLayer:
        checkpoint = open_checkpoint(config)
        built = DecoderLayer(1, config, Unquantized(), tp, torch.float16, tiny.CPU)
        for module in built.modules():
            if module is not built and hasattr(module, "load"):
                module.load(checkpoint)
        return built

    whole, ranks = layer(TensorParallel()), [layer(TensorParallel(rank, 3)) for rank in range(3)]
    q, kv = 3 * config.head_dim, config.head_dim
    shares = [rank.self_attn.qkv_proj.weight.split([q, kv, kv]) for rank in ranks]
    qkv = torch.cat([share[i] for i in range(3) for share in shares])
    assert torch.equal(qkv, whole.self_attn.qkv_proj.weight)
    o = torch.cat([rank.self_attn.o_proj.weight for rank in ranks], 1)
    assert torch.equal(o, whole.self_attn.o_proj.weight)
    down = torch.cat([rank.mlp.down_proj.weight for rank in ranks], 1)
    assert torch.equal(down, whole.mlp.down_proj.weight)


def test_shards_cover_any_length_without_overlap():
    for whole in range(12):
        for size in range(1, 7):
            bounds = [Shard(rank, size).bounds(whole) for rank in range(size)]
            assert [i for start, stop in bounds for i in range(start, stop)] == list(range(whole))
            assert all(b - a <= Shard(0, size).length(whole) for a, b in bounds)


def test_a_size_that_does_not_divide_the_model_is_an_error(tmp_path):
    tiny.make("Llama").save_pretrained(tmp_path)
    for size in (3, 8):  # of 4 heads
        with pytest.raises(ValueError, match=f"--tp-size {size} does not divide the model"):
            build(tmp_path, TensorParallel(0, size))
    config = replace(
        ModelConfig.load(ServerArgs(model_path=str(tmp_path), device="cpu")), intermediate_size=97
    )
    with pytest.raises(ValueError, match=r"cannot be split into 2 along dimension 0"):
        build_model(config, TensorParallel(0, 2), tiny.CPU, open_checkpoint(config))


def _rank(rank: int, folder: str, ids: list[int]) -> None:
    torch.set_num_threads(1)
    tp = TensorParallel.join(rank, 2, f"{folder}/rendezvous", tiny.CPU)
    torch.save(tiny.our_logits(build(folder, tp), ids), f"{folder}/logits{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_transformers_does(tmp_path):
    model = tiny.make("Llama", tie_word_embeddings=True, attention_bias=True)
    model.save_pretrained(tmp_path)
    ids = torch.randint(99, (40,)).tolist()
    mp.spawn(_rank, (str(tmp_path), ids), nprocs=2)
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0]
    for rank in range(2):
        logits = torch.load(tmp_path / f"logits{rank}")
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
