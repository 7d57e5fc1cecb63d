"""The repository as a whole: what no single module's tests can see."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from sglang.server_args import ServerArgs, flag_name

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 450
TEXT = (".py", ".md", ".toml", ".yaml", ".sh", "")


def tracked_files() -> list[Path]:
    """Of the repository; of the folder, where there is no git."""
    try:
        names = subprocess.check_output(
            ["git", "-C", ROOT, "ls-files", "-z"], text=True, stderr=subprocess.DEVNULL
        ).split("\0")
    except (OSError, subprocess.CalledProcessError):
        folders = ("sglang", "tests", "benchmarks", "docs")
        names = [str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).rglob("*.*")]
        names += ["README.md", "pyproject.toml"]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


FILES = [path for path in tracked_files() if path.suffix in TEXT and path.name != "LICENSE"]
PYTHON = [path for path in FILES if path.suffix == ".py"]


def lines_with(pattern: str, files: list[Path]) -> list[str]:
    """ "file:line: text", but for this file, which has to spell what it looks for."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_files_are_short():
    lengths = {path.relative_to(ROOT): path.read_text("utf-8").count("\n") for path in PYTHON}
    too_long = {str(name): n for name, n in lengths.items() if n > MAX_LINES}
    assert not too_long, f"a file of more than {MAX_LINES} lines is probably two things"


@pytest.mark.parametrize("name", ServerArgs.__dataclass_fields__)
def test_readme_names_every_flag(name: str):
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"`{flag_name(name)}`" in readme, "python docs/flags.py writes the README's table"


def test_readme_names_no_flag_that_does_not_exist():
    """In its table; elsewhere it also speaks of other programs' flags."""
    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme.split("<!-- flags -->\n")[1].split("<!-- end of flags -->")[0]
    first_column = "\n".join(row.split("|")[1] for row in table.splitlines())
    named = set(re.findall(r"`--([\w-]+)`", first_column))
    spellings = {
        spelling.removeprefix("--")
        for field in ServerArgs.__dataclass_fields__.values()
        for spelling in (flag_name(field.name), *field.metadata["spellings"])
    }
    assert named <= spellings


def test_readme_names_every_endpoint():
    readme = (ROOT / "README.md").read_text("utf-8")
    for path in (ROOT / "sglang/server").rglob("*.py"):
        text = path.read_text("utf-8")
        for name in re.findall(r"@\w+\.(?:get|post|api_route)\(\s*\"(/[^\"{]*[^\"{/])", text):
            assert f"`{name}`" in readme, f"{name}, of {path.name}"


def test_files_that_the_documentation_links_to_exist():
    for path in FILES:
        if path.suffix == ".md":
            text = path.read_text("utf-8")
            for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_scripts_that_the_readme_names_exist():
    readme = (ROOT / "README.md").read_text("utf-8")
    for name in re.findall(r"\b(?:benchmarks|docs|tests|sglang)/[\w/]+\.\w+", readme):
        assert (ROOT / name).is_file(), name


def test_nothing_is_left_to_do():
    assert not lines_with(r"\b(TODO|FIXME|XXX|HACK)\b", FILES)


def test_no_path_of_a_developers_machine_and_no_package_mirror():
    mine = r"/(home|Users|work|root|workspace|mnt|opt)/\w"
    assert not lines_with(mine, FILES)
    assert not lines_with(r"--(extra-)?index-url|--find-links|pypi\.org|--trusted-host", FILES)


def test_nothing_is_printed_or_stopped_at_by_accident():
    engine = [path for path in PYTHON if path.relative_to(ROOT).parts[0] == "sglang"]
    assert not lines_with(r"\bbreakpoint\(\)|\bpdb\b", PYTHON)
    quiet = [p for p in engine if {"router", "worker", "kernels", "layers"} & set(p.parts)]
    assert not lines_with(r"^\s*print\(", quiet)


def test_text_ends_in_one_newline_and_no_line_in_blanks():
    for path in FILES:
        data = path.read_bytes()
        assert not data or (data.endswith(b"\n") and not data.endswith(b"\n\n")), path
        assert b"\r" not in data, path
    assert not lines_with(r"[ \t]+$", FILES)


def test_no_large_file_is_tracked():
    assert not [path for path in tracked_files() if path.stat().st_size > 500_000]


def test_what_starts_like_a_script_can_be_run():
    for path in FILES:
        if path.read_bytes().startswith(b"#!"):
            assert os.access(path, os.X_OK), path


def test_public_modules_say_what_they_are():
    for path in PYTHON:
        if path.relative_to(ROOT).parts[0] in ("sglang", "benchmarks") and path.stat().st_size:
            with tokenize.open(path) as file:
                assert file.read().lstrip().startswith(('"""', "#")), f"{path} has no docstring"


def test_benchmarks_can_be_imported():
    """Those whose packages are here: a benchmark is used too seldom to break in silence."""
    folder = ROOT / "benchmarks"
    code = f"""
import importlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(folder)!r}]
for name in {sorted(path.stem for path in PYTHON if path.parent == folder)}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name in ("aiohttp", "matplotlib", "flashinfer", "vllm"), (name, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
