"""python -m sglang.chat: what it sends and what it shows."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from sglang import demo_model
from tests.e2e.serving import Server


def run(lines: list[str], *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sglang.chat", "--temperature", "0", *flags]
    said = "\n".join(lines) + "\n"
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=120)


def replies(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [line for line in done.stdout.split("> ") if line.strip()]


@pytest.fixture(scope="module")
def watched():
    """Its log tells what it was asked."""
    flags = ["--log-requests", "--log-requests-level", "3", "--context-length", "200"]
    server = Server("--dtype", "float32", *flags).wait_ready()
    yield server
    server.stop()


def prompts(server: Server) -> list[str]:
    return [line for line in server.stderr().splitlines() if "received chatcmpl" in line]


def test_a_conversation_is_remembered_until_it_is_reset(watched):
    question = "What is the capital of France?"
    lines = [question, "Say it again.", "/reset", "Hi", "/system Be terse.", question, "/quit"]
    said = replies(run(lines, "--url", watched.url))
    assert said[0] == "The capital of France is Paris.\n" and len(said) == 4
    first, second, reset, terse = prompts(watched)
    assert question in second and "The capital of France is Paris." in second
    assert "Say it again." in second and "Say it again." not in first
    assert question not in reset and "Be terse." not in reset
    assert "Be terse." in terse and question in terse and "Hi" not in terse


def test_what_the_server_refuses_is_said_and_the_chat_goes_on(watched):
    done = run(["word " * 300, "What is the capital of France?"], "--url", watched.url)
    assert done.returncode == 1 and "Paris" in done.stdout
    assert done.stderr.startswith("error: messages has ") and "200 tokens" in done.stderr
    done = run(["/rest"], "--url", watched.url)
    assert "/reset" in done.stderr


def test_without_a_server_there_is_an_error():
    done = run(["Hi"], "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


class Broken(BaseHTTPRequestHandler):
    """A proxy without a server behind it; then a server that ends amid its reply."""

    said = iter(
        [
            (502, b"<html>Bad Gateway</html>"),
            (200, b'data: {"choices": [{"delta": {"content": "The capi"}}]}\n\n'),
        ]
    )

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = next(self.said)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_a_reply_that_is_none_or_is_cut_short_is_an_error():
    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = run(["Hi", "Hi"], "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 1 and "The capi" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2 and "502" in errors[0] and "amid its reply" in errors[1]
    done = run(["Hi"], "--url", "http://127.0.0.1:abc")
    assert done.returncode == 1 and done.stderr.startswith("error: http://127.0.0.1:abc: ")


def test_a_chat_that_ends_takes_its_server_with_it():
    chat = subprocess.Popen(
        [sys.executable, "-m", "sglang.chat", "--model-path", "", "--device", "cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while not (family := psutil.Process(chat.pid).children(recursive=True)):
        time.sleep(0.01)
    chat.kill()  # as its terminal does that closes
    chat.wait(timeout=5)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_local_model_is_served_for_the_chat():
    flags = ["--model-path", str(demo_model.fetch()), "--device", "cpu", "--dtype", "float32"]
    said = replies(run(["What is the capital of France?"], *flags))
    assert said == ["The capital of France is Paris.\n"]
