"""Where a tool's errors become its exit status, as `pipeline.cli.main` does it for commands."""

import sys
from collections.abc import Callable

from pipeline.core.errors import PipelineError


def run_tool(main: Callable[[list[str]], None]) -> None:
    """Run a tool on the arguments of this process; tell a PipelineError in one line and exit."""
    try:
        main(sys.argv[1:])
    except PipelineError as failure:
        print(f"Error: {failure}", file=sys.stderr)
        raise SystemExit(failure.exit_code) from failure


def print_now(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)
