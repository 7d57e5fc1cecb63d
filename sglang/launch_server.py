"""The command line: python -m sglang.launch_server --model-path ... --port ..."""

from __future__ import annotations

import sys

from sglang.server_args import parse_args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 after SIGTERM, 130 after Ctrl-C, 1 where a start or the engine
    failed (and then the last line on stderr says why)."""
    args = parse_args(argv)
    from sglang.server.launch import serve

    return serve(args)


if __name__ == "__main__":
    sys.exit(main())
