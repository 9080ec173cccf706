"""Common parts of the tools' command lines: arguments, progress, and exit statuses."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths


def run_tool(main: Callable[[list[str]], None]) -> None:
    """Run a tool on this process's arguments; print a PipelineError in one line and exit."""
    try:
        main(sys.argv[1:])
    except PipelineError as failure:
        print(f"Error: {failure}", file=sys.stderr)
        raise SystemExit(failure.exit_code) from failure


def make_result_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the file of a result and the name of the measured model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("result", type=Path)
    parser.add_argument("--name", default=Paths.name)
    return parser


def print_now(line: str) -> None:
    """Print a line of progress immediately."""
    print(line, flush=True)
