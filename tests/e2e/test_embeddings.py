"""/v1/embeddings: the hidden states of transformers, as unit vectors."""

from __future__ import annotations

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import openai
import pytest
import torch

from tests.reference import demo_model_in_transformers

TEXTS = ["The capital of France is", "Once upon a time", "こんにちは"]
LONG = [(7 * i * i + i) % 40000 + 100 for i in range(1100)]  # more than two chunks of 512


@cache
def hidden_states(*ids: int) -> torch.Tensor:
    model, _ = demo_model_in_transformers()
    with torch.inference_mode():
        return model.model(torch.tensor([ids])).last_hidden_state[0].float()


def reference(ids: list[int], pooling: str) -> np.ndarray:
    hidden = hidden_states(*ids)
    vector = hidden[-1] if pooling == "last" else hidden.mean(0)
    return (vector / vector.norm()).numpy()


def tokens(server, text: str) -> list[int]:
    return server.post("/tokenize", {"text": text}).json()["tokens"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_hidden_states_of_transformers(server, client, model, pooling):
    extra = {"pooling": pooling}
    for _ in range(2):  # the second time the prefix is cached
        reply = client.embeddings.create(model=model, input=TEXTS, extra_body=extra)
        assert [e.index for e in reply.data] == [0, 1, 2]
        for text, said in zip(TEXTS, reply.data, strict=True):
            expected = reference(tokens(server, text), pooling)
            np.testing.assert_allclose(said.embedding, expected, atol=1e-4)
    assert reply.usage.prompt_tokens == sum(len(tokens(server, text)) for text in TEXTS)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens
    for _ in range(2):
        reply = client.embeddings.create(model=model, input=LONG, extra_body=extra)
        np.testing.assert_allclose(reply.data[0].embedding, reference(LONG, pooling), atol=1e-4)
    assert server.wait_idle(1.0)


def test_texts_and_token_ids_floats_and_base64_say_the_same(server, client, model):
    ids = [tokens(server, text) for text in TEXTS]
    floats = [
        [e.embedding for e in client.embeddings.create(
            model=model, input=given, encoding_format="float").data]
        for given in (TEXTS, ids)
    ]  # fmt: skip
    np.testing.assert_allclose(*floats, atol=1e-5)
    raw = server.post("/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"}).json()
    decoded = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(decoded, floats[0][0], atol=1e-5)


def test_fewer_dimensions_are_a_beginning_of_length_one(client, model):
    whole = client.embeddings.create(model=model, input=TEXTS[0]).data[0].embedding
    short = client.embeddings.create(model=model, input=TEXTS[0], dimensions=64).data[0].embedding
    assert len(whole) == 576 and len(short) == 64
    np.testing.assert_allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)


def test_a_text_is_nearer_to_its_like(client, model):
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Stocks fell 3% today."]
    reply = client.embeddings.create(model=model, input=texts, extra_body={"pooling": "mean"})
    a, b, c = (np.array(e.embedding) for e in reply.data)
    assert a @ b > a @ c


def test_many_at_once_beside_generation_do_not_disturb_each_other(server, client, model):
    texts = [f"{i} times {i} is" for i in range(40)]
    alone = client.embeddings.create(model=model, input=texts[7]).data[0].embedding
    stream = client.completions.create(
        model=model, prompt="Once", max_tokens=20, stream=True, temperature=0
    )
    next(stream)
    together = client.embeddings.create(model=model, input=texts).data[7].embedding
    np.testing.assert_allclose(together, alone, atol=1e-5)
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert text
    assert server.wait_idle(1.0)


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": [49152]}, "input", "[0, 49152)"),
        ({"input": "word " * 9000}, "input", "8192"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "dimensions": 577}, "dimensions", "576"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'base64'"),
        ({"input": "a", "pooling": "max"}, "pooling", "'mean'"),
    ],
)
def test_what_cannot_be_embedded_is_refused(server, fields, param, part):
    response = server.post("/v1/embeddings", fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and part in error["message"], error


def test_an_aborted_request_is_no_empty_vector(server):
    with ThreadPoolExecutor(1) as pool:
        body = {"input": ["word " * 1000] * 100}
        reply = pool.submit(server.post, "/v1/embeddings", body)
        while server.stats()["running"] == 0 and not reply.done():
            time.sleep(0.01)
        server.post("/abort_request", {"abort_all": True})
        assert reply.result().status_code == 503
        assert "aborted" in reply.result().json()["error"]["message"]


def test_an_async_client_embeds_too(server, model):
    async def embed() -> list[float]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            return (await client.embeddings.create(model=model, input="Hi")).data[0].embedding

    import asyncio

    assert abs(np.linalg.norm(asyncio.run(embed())) - 1) < 1e-5
