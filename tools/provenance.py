"""Provenance of the figures in the README: the sources that decide each, and its content's digest.

A figure has the digests of its sources and of its own content. The second reveals a number that was
changed by mistake; it is not a signature, since an editor of the file can write a new digest too.
"""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import read_json, sha256, write_json
from pipeline.training.recipes import RECIPES

PACKAGE = Path(__file__).parent.parent / "pipeline"  # the sources are relative to it
MEASURE = "measure it with 'make figures'"
NETWORK = "training/augment training/outliers training/networks training/loop"
_BACKEND = "serving/backend/onnxruntime"
_PARTS = ("model", "ort_checks", "ort_settings")
BACKEND = " ".join(("repository/ort_values", *(f"{_BACKEND}/{name}" for name in _PARTS)))
SERVER = f"serving/serve serving/process serving/ready repository/config_pbtxt {BACKEND}"
RULES = "images/read images/ink images/crop"
TIMING = "benchmark/timing benchmark/load benchmark/load_http benchmark/serving"
_LINT = ("check", "text", "graph", "files", "config", "backend", "tensors")
LINT = " ".join(f"repository/lint/{name}" for name in _LINT)
# The modules that decide each figure: a change of one of them makes the figure stale.
_MODULES = {
    "agreement": f"training/recipes {NETWORK} training/run export/export validation/agreement "
    f"repository/golden repository/release repository/profiles {SERVER}",
    "training": f"{NETWORK} training/run",
    "processors": f"training/recipes {NETWORK} training/run ../tools/prove_processors",
    "rebuild": f"training/recipes {NETWORK} training/run export/export export/rebuild",
    "resume": "training/loop training/checkpoint training/records training/run core/files",
    "runtimes": "training/networks export/targets export/graph export/export",
    "lint": f"{LINT} serving/scratch {BACKEND}",
    "swap": f"serving/swap serving/admin repository/release repository/versions "
    f"repository/package {SERVER}",
    "kill": f"serving/supervise {SERVER}",
    "soak": f"serving/supervise {SERVER}",
    "serving": f"repository/profiles {TIMING} {BACKEND}",
    "compare": f"benchmark/compare benchmark/inference benchmark/workers {TIMING}",
    "gateway": f"web/gateway web/server web/guard web/limits web/link {RULES}",
    "photos": f"training/recipes {NETWORK} ../tools/photos {RULES}",
    "unsure": f"training/recipes {NETWORK} core/evaluate ../tools/nondigits {RULES}",
    "folder_unsure": f"training/recipes {NETWORK} core/evaluate data/folders ../tools/nondigits "
    "../tools/prove_folder_unsure",
    "finetune": f"training/recipes {NETWORK} training/run training/checkpoint data/folders "
    f"data/splits {RULES} ../tools/prove_finetune",
    "score": "scoring/source scoring/parquet scoring/worker scoring/cluster scoring/job "
    "export/runtime",
    "install": "client/client client/query cli/command ../tools/prove_install",
    "lowest": "../tools/lowest ../tools/prove_lowest",
    "exact": "export/exact validation/exact ../tools/prove_exact",
    "native": "validation/rounds validation/servers",
    "gpu": f"training/device {NETWORK} ../tools/gpu_check",
}
SOURCES = {
    figure: tuple(f"{module}.py" for module in modules.split())
    for figure, modules in _MODULES.items()
}


_MODULE_PATH = re.compile(r"\bpipeline(\.\w+)+")


def hash_sources(figure: str, *settings: object) -> str:
    """Return one SHA-256 of the code and the settings that decide a figure.

    Moving code within a file, or to another one of these sources, does not change the digest.
    """
    texts = {
        text for name in SOURCES[figure] for text in list_statements((PACKAGE / name).read_text())
    }
    return sha256(repr((sorted(texts), settings)).encode())


def list_statements(source: str) -> list[str]:
    """Return the syntax of each top-level statement as text, the same on every Python from 3.11.

    What does not decide a measurement is left out: layout, comments, imports, docstrings, and the
    paths of this project's modules.
    """
    tree = ast.parse(source)
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith(("pipeline", "tools"))
        for alias in node.names
        if (PACKAGE.parent / f"{node.module}.{alias.name}".replace(".", "/"))
        .with_suffix(".py")
        .exists()
    }
    return [text for node in tree.body if (text := _syntax(node, modules))]


def _syntax(value: object, modules: set[str]) -> str:
    """Return a node, a list of nodes or a value as text; an empty one for what is left out."""
    match value:
        case None | ast.Import() | ast.ImportFrom() | ast.expr_context():
            return ""
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Expr(value=ast.Constant(value=str())):
            return ""
        case ast.Attribute(value=ast.Name(id=name)) if name in modules:
            return f"Name(id={value.attr!r})"  # the same as when it is imported by its own name
        case ast.JoinedStr(values=parts):
            # Python 3.12 has empty strings in format specifications, others do not.
            texts = [text for part in parts if (text := _syntax(part, modules)) != "''"]
            return f"JoinedStr([{', '.join(texts)}])"
        case ast.Constant(value=str(text)):
            return repr(_MODULE_PATH.sub("pipeline", text))
        case ast.Constant():
            return repr(value.value)
        case ast.AST():
            fields = [(name, _syntax(inner, modules)) for name, inner in ast.iter_fields(value)]
            listed = ", ".join(f"{name}={text}" for name, text in fields if text)
            return f"{type(value).__name__}({listed})"
        case list():
            # A missing default or key keeps its place; a statement that is left out has none.
            texts = ["-" if item is None else _syntax(item, modules) for item in value]
            return f"[{', '.join(filter(None, texts))}]" if value else ""
        case _:
            return repr(value)


def hash_recipe(recipe: str) -> str:
    """Return the digest of a row of the training table, which does not depend on other recipes."""
    return hash_sources("training", RECIPES.get(recipe))


def write_figure(name: str, file: Path, record: Mapping[str, Any]) -> None:
    """Write the measured result `name` with the digest of its sources and of its content.

    Each row of the training table has the digest of its own sources.
    """
    figure = dict(record)
    if name != "training":
        figure["sources_sha256"] = hash_sources(name)
    write_json(file, {**figure, "content_sha256": _hash_content(figure)})


def read_figure(file: Path) -> dict[str, Any]:
    """Read a measured result; CorruptError if its content does not match its digest."""
    figure = read_json(file, MEASURE)
    recorded, actual = str(figure.get("content_sha256")), _hash_content(figure)
    if recorded != actual:
        command, digests = figure.get("command"), f"recorded {recorded[:12]}, found {actual[:12]}"
        message = f"{file} does not match the digest of its content ({digests})"
        raise CorruptError(f"{message}: measure it again with '{command or 'make figures'}'")
    return figure


def _hash_content(figure: Mapping[str, Any]) -> str:
    """Return one SHA-256 of a figure's content, independent of its file's indentation."""
    content = {k: v for k, v in figure.items() if k not in ("schema", "content_sha256")}
    return sha256(json.dumps(content).encode())


def list_stale(figures: Path) -> list[str]:
    """List the figures, and rows of the training table, that were measured on other sources."""
    names = []
    for path in sorted(figures.glob("*.json")):
        record = read_figure(path)
        if path.stem == "training":
            digests = {row["recipe"]: row.get("sources_sha256") for row in record["rows"]}
            rows = [recipe for recipe in digests if digests[recipe] != hash_recipe(recipe)]
            names += [f"{path.name} ({', '.join(rows)})"] if rows else []
        elif path.stem not in SOURCES:
            raise PipelineError(f"{path.name} has no sources in provenance.py")
        elif record.get("sources_sha256") != hash_sources(path.stem):
            names.append(path.name)
    return names
