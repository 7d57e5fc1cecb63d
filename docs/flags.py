"""Writes the README's table of flags anew, from ServerArgs: python docs/flags.py"""

from __future__ import annotations

import argparse
from pathlib import Path

from sglang.server_args import add_cli_args

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- flags -->\n", "<!-- end of flags -->\n"


def flags() -> list[argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    add_cli_args(parser)
    return parser._actions


def table() -> str:
    lines = ["| flag | what it is |", "|---|---|"]
    for action in flags():
        name, *others = (f"`{spelling}`" for spelling in action.option_strings)
        also = f" (also {', '.join(others)})" if others else ""
        choices = f"; one of {', '.join(action.choices)}" if action.choices else ""
        lines.append(f"| {name}{also} | {(action.help or '') + choices} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    main()
