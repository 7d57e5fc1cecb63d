"""A chat in the terminal: python -m sglang.chat --url http://127.0.0.1:30000

/reset forgets the conversation, /system TEXT begins one with that system prompt, /quit ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


def stream(url: str, api_key: str, body: dict[str, Any]) -> Iterator[str]:
    """The reply, as it comes. Raises OSError, with the server's own words where it has some."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", data, headers)
    try:
        reply = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        raise OSError(json.load(error)["error"]["message"]) from None
    with reply:
        for line in reply:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    yield choice["delta"].get("content") or ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang.chat", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument("--temperature", type=float)
    args = parser.parse_args(argv)
    with contextlib.suppress(ImportError):  # line editing and history
        import readline  # noqa: F401
    system, messages = args.system, []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        command, _, rest = text.partition(" ")
        if command in ("/quit", "/exit"):
            return 0
        if command in ("/reset", "/system"):
            system, messages = (rest if command == "/system" else system), []
        elif text:
            messages.append({"role": "user", "content": text})
            first = [{"role": "system", "content": system}] if system else []
            body = {"messages": first + messages, "temperature": args.temperature}
            said = ""
            try:
                for piece in stream(args.url.rstrip("/"), args.api_key, body):
                    said += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pass
            except OSError as error:
                print(f"error: {error}", file=sys.stderr)
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    sys.exit(main())
