"""A chat in the terminal, with a server or with a model that it serves itself:

    python -m sglang.chat --url http://127.0.0.1:30000
    python -m sglang.chat --model-path Qwen/Qwen3-0.6B        (and other flags of a server)

/reset forgets the conversation, /system TEXT begins one with that system prompt, /quit ends.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

from sglang.processes import end_with


@contextlib.contextmanager
def local_server(flags: list[str]) -> Iterator[str]:
    """A server of this chat's own; its URL. Raises OSError where it does not start."""
    command = [sys.executable, "-m", "sglang.launch_server", "--log-level", "warning"]
    # Ctrl-C is for the reply that is being written, not for the server.
    server = subprocess.Popen(
        [*command, *flags, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(end_with, os.getpid(), signal.SIGTERM),  # when this terminal closes, say
    )
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if match := re.search(r"served at (http://\S+)\.", line):
                yield match[1]
                return
        raise OSError("the server did not start")
    finally:
        server.terminate()
        server.wait()


def stream(url: str, api_key: str, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(reasoning, text) as they come. Raises OSError, with the server's own words where it has
    some."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
    data = json.dumps({**body, "stream": True}).encode()
    try:
        request = urllib.request.Request(url + "/v1/chat/completions", data, headers)
        reply = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        raise OSError(_message(error)) from None
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{url}: {error}") from None
    with reply:
        for line in reply:
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise OSError(event["error"]["message"])
                for choice in event["choices"]:
                    delta = choice["delta"]
                    yield delta.get("reasoning_content") or "", delta.get("content") or ""
    raise OSError("the server ended amid its reply")


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own, or what a proxy before it says."""
    try:
        return json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return str(error)


def answer(url: str, api_key: str, body: dict[str, Any]) -> str:
    """Prints the reply as it comes, up to Ctrl-C; returns its text."""
    said = ""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    with contextlib.suppress(KeyboardInterrupt):
        for reasoning, text in stream(url, api_key, body):
            said += text
            print(f"{dim}{reasoning}{plain}{text}" if reasoning else text, end="", flush=True)
    print()
    return said


def chat(url: str, api_key: str, system: str, temperature: float | None) -> bool:
    """Whether everything that was said got an answer."""
    messages: list[dict[str, str]] = []
    all_answered = True
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return all_answered
        command, _, rest = text.partition(" ")
        if command in ("/quit", "/exit"):
            return all_answered
        if command in ("/reset", "/system"):
            system, messages = (rest if command == "/system" else system), []
        elif command.startswith("/"):
            print("/reset, /system TEXT or /quit", file=sys.stderr)
        elif text:
            messages.append({"role": "user", "content": text})
            first = [{"role": "system", "content": system}] if system else []
            body = {"messages": first + messages, "temperature": temperature}
            try:
                said = answer(url, api_key, body)
            except OSError as error:
                print(f"error: {error}", file=sys.stderr)
                messages.pop()
                all_answered = False
                continue
            messages.append({"role": "assistant", "content": said})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="of a server (default: http://127.0.0.1:30000)")
    parser.add_argument("--model-path", "--model", help="a model to serve for this chat alone")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument("--temperature", type=float)
    args, flags = parser.parse_known_args(argv)
    if flags and args.model_path is None:
        parser.error(f"unknown argument {flags[0]}; a server's flags need --model-path")
    if args.url and args.model_path is not None:
        parser.error("--url and --model-path exclude each other")
    with contextlib.suppress(ImportError):  # line editing and history
        import readline  # noqa: F401
    url = (args.url or "http://127.0.0.1:30000").rstrip("/")
    try:
        if args.model_path is None:
            answered = chat(url, args.api_key, args.system, args.temperature)
        else:
            with local_server(["--model-path", args.model_path, *flags]) as own:
                answered = chat(own, args.api_key, args.system, args.temperature)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if answered or sys.stdin.isatty() else 1  # which a script should know


if __name__ == "__main__":
    sys.exit(main())
