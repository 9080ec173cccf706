"""What the command lines of tools have in common: arguments, progress, and exit statuses."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths


def run_tool(main: Callable[[list[str]], None]) -> None:
    """Run a tool on the arguments of this process; tell a PipelineError in one line and exit."""
    try:
        main(sys.argv[1:])
    except PipelineError as failure:
        print(f"Error: {failure}", file=sys.stderr)
        raise SystemExit(failure.exit_code) from failure


def result_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the file of a result, and of the name of the model that is measured."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("result", type=Path)
    parser.add_argument("--name", default=Paths.name)
    return parser


def print_now(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)
