"""What a grammar costs the rows beside it: the speed of free rows, by what else is in the batch.

    python benchmarks/constrained.py --rows 16

`rows` free requests run alone, beside as many free ones, and beside as many that a JSON schema
constrains. A mask is made in the router while the step before it runs, so the last two should be
the same. The demo model, if nothing else is said; flags of the server may follow.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["cook", "pilot"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 5},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["name", "age", "role", "tags", "zip"],
    "additionalProperties": False,
}
PEOPLE = json.dumps({"type": "array", "items": PERSON, "minItems": 500})
"""It outlasts any output."""


class Server:
    def __init__(self, flags: list[str]) -> None:
        command = [sys.executable, "-m", "sglang.launch_server", "--port", "0", *flags]
        root = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if match := re.search(r"served at (http://\S+)\.", line):
                self._url = match.group(1)
                return
        raise SystemExit("the server did not start")

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def forced_tokens(self) -> int:
        with urllib.request.urlopen(self._url + "/get_server_info") as reply:
            return json.load(reply)["stats"]["forced_tokens"]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def measure(server: Server, rows: int, length: int, others: dict | None) -> float:
    """ms a token of the free rows. others: the parameters of as many requests beside them."""
    params = {"temperature": 0.7, "max_new_tokens": length, "ignore_eos": True}

    def send(kind: str, params: dict) -> float:
        prompts = [f"{kind} {i}. Write a list of people as JSON.\n" for i in range(rows)]
        start = time.perf_counter()
        server.post("/generate", {"text": prompts, "sampling_params": params})
        return time.perf_counter() - start

    beside = None
    if others is not None:
        longer = {**params, "max_new_tokens": 4 * length, **others}
        beside = threading.Thread(target=send, args=("B", longer))
        beside.start()
        time.sleep(0.5)  # prompts done, grammars compiled
    seconds = send("A", params)
    if beside is not None:
        server.post("/abort_request", {"abort_all": True})
        beside.join()
    return 1000 * seconds / length


def main() -> None:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", default="16", help="of each kind; several, comma-separated")
    parser.add_argument("--output-len", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the results here")
    args, flags = parser.parse_known_args()
    ways = {"alone": None, "beside free": {}, "beside constrained": {"json_schema": PEOPLE}}
    sizes = [int(rows) for rows in args.rows.split(",")]
    server = Server(["--log-level", "warning", *(flag for flag in flags if flag != "--")])
    results = {}
    try:
        print("| free rows | alone, ms/token | beside free | beside constrained | slower by |")
        print("|---|---|---|---|---|", flush=True)
        for rows in sizes:
            figures: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(args.rounds + 1):  # the first warms up
                for way, others in ways.items():
                    figures[way].append(measure(server, rows, args.output_len, others))
            results[rows] = {way: statistics.median(values[1:]) for way, values in figures.items()}
            alone, free, constrained = results[rows].values()
            slower = constrained / free - 1
            print(
                f"| {rows} | {alone:.2f} | {free:.2f} | {constrained:.2f} | {slower:+.0%} |",
                flush=True,
            )
        print(f"\n{server.forced_tokens()} tokens were forced, and not sampled.")
    finally:
        server.stop()
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
