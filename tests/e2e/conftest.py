from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.e2e.serving import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Shared by all tests that leave it running. Exact: the demo model's default on a CPU is 8-bit
    products, whose results depend a little on what else is in the batch."""
    server = Server("--dtype", "float32").wait_ready()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id
