"""Keep what commands measured as results, and render the pages' blocks from the results.

python -m tools.readme                               render the pages
python -m tools.readme agreement AGREEMENT SUMMARY   keep a proof and the run's summary, then render
python -m tools.readme serving RECORD                keep what `benchmark --what serve` wrote
python -m tools.readme training RECORD               keep what `benchmark --what train` printed
"""

import argparse
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.core.errors import PipelineError
from pipeline.core.files import read_json, write_bytes
from pipeline.core.machine import machine
from tools.edge import run_tool
from tools.provenance import MEASURE, hash_recipe, read_figure, write_figure

PAGES = (Path("README.md"), Path("docs/results.md"))  # the pages that have blocks of results
PROSE_WIDTH = 116  # of a line, in characters
RESULTS = Path("tools/results")
NOT_VERIFIED = (
    "*Not verified*: training and inference on a GPU (`make gpu-check` checks them on a machine "
    "that has one)."
)
NATIVE_NOT_VERIFIED = (
    "*Not verified*: this model inside NVIDIA's Triton container. The server here runs the same "
    "bytes by a backend of our own; `make prove-native` checks the container, where Docker is."
)
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["as"] = format
_TEMPLATE = _ENVIRONMENT.get_template("readme.md.jinja")
BLOCKS = {name for name in dir(_TEMPLATE.module) if not name.startswith("_")}
_BLOCK = re.compile(r"(<!-- figures:(\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def keep_result(name: str, file: Path, command: str, record: Mapping[str, Any]) -> None:
    """Write a measured result with the command that measures it, and render the pages."""
    write_figure(name, file, {**record, "command": command})
    render_pages()
    print(f"wrote {file}")


def read_agreement_figure(agreement: Path, summary: Path) -> dict[str, Any]:
    """Read the agreement of a model's runtimes, and the quoted fields of its run's summary."""
    proof, training = read_json(agreement, MEASURE), read_json(summary, MEASURE)
    keys = ("recipe", "parameters", "test_accuracy", "train_seconds", "device")
    return {**proof, "training": {key: training[key] for key in keys}}


def merge_training_figure(rows: Sequence[dict[str, Any]], figure: Path) -> dict[str, Any]:
    """Merge measured rows into a figure; its rows of other recipes stay unchanged."""
    measured = {
        row["recipe"]: {**row, **machine(), "sources_sha256": hash_recipe(row["recipe"])}
        for row in rows
    }
    if figure.exists():
        measured = {row["recipe"]: row for row in read_figure(figure)["rows"]} | measured
    return {"rows": sorted(measured.values(), key=lambda row: float(row["share"]))}


def main(arguments: list[str]) -> None:
    """Keep a result, if one is given, and render the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=("agreement", "serving", "training"))
    parser.add_argument("files", nargs="*", type=Path)
    given = parser.parse_args(arguments)
    figure = RESULTS / f"{given.kind}.json"
    if given.kind == "agreement":
        record = read_agreement_figure(*given.files)
        keep_result("agreement", figure, "make figures", record)
    elif given.kind == "serving":
        record = read_json(given.files[0], MEASURE)
        keep_result("serving", figure, f"make prove-serving NAME={record['name']}", record)
    elif given.kind == "training":
        record = merge_training_figure(json.loads(given.files[0].read_text())["rows"], figure)
        keep_result("training", figure, "make prove-training", record)
    else:
        render_pages()


def render_block(name: str, figures: Path) -> str:
    """Render a block of a page from its result, or state that there is no measurement yet."""
    if name not in BLOCKS:
        raise PipelineError(f"a page has figures {name!r}, which no template renders")
    figure = figures / f"{name}.json"
    target = "test-lowest" if name == "lowest" else f"prove-{name.replace('_', '-')}"
    if figure.exists() or name == "agreement":
        text = render_macro(name, read_figure(figure))
    else:
        text = NOT_VERIFIED if name == "gpu" else f"*Not measured yet*: `make {target}`."
    if name != "gpu":
        return text
    native = figures / "native.json"
    record = read_figure(native) if native.exists() else {}
    is_native = record.get("passed") is True and record.get("runtime") in ("docker", "path")
    native_text = render_macro("native", record) if is_native else NATIVE_NOT_VERIFIED
    return f"{text} {native_text}"


def render_macro(name: str, figure: Mapping[str, Any]) -> str:
    """Render a result by its macro in `readme.md.jinja`."""
    return str(getattr(_TEMPLATE.module, name)(figure)).strip()


def wrap(text: str) -> str:
    """Break the lines of a Markdown text that are too long, except the rows of tables."""
    return "\n".join(
        line
        if line.startswith("|")
        else textwrap.fill(line, PROSE_WIDTH, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def render_page(page: str, figures: Path) -> str:
    """Return `page` with every figures block rendered again from its JSON."""

    def render(match: re.Match[str]) -> str:
        return f"{match[1]}{wrap(render_block(match[2], figures))}\n{match[3]}"

    return _BLOCK.sub(render, page)


def render_pages(root: Path = Path(), figures: Path = RESULTS) -> list[Path]:
    """Write the results into the existing pages below `root`; return those pages."""
    pages = [root / page for page in PAGES if (root / page).exists()]
    for page in pages:
        write_bytes(page, render_page(page.read_text(), figures).encode())
    return pages


if __name__ == "__main__":
    run_tool(main)
