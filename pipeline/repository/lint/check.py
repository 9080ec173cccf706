"""Lint of a model repository: applies all rules to its files, without a server."""

import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.text import Lines
from pipeline.export.targets import Target
from pipeline.repository.lint import backend, files, tensors
from pipeline.repository.lint import config as lint_config
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.graph import Graph, read_graph
from pipeline.repository.lint.text import Config, Finding, read_config

CONFIG, PROFILES = "config.pbtxt", "configs"
# Rules for the config of any backend.
OF_ANY_BACKEND = (
    lint_config.naming,
    lint_config.batching,
    lint_config.scheduling,
    lint_config.tensors,
    lint_config.instances,
    lint_config.labels,
    files.code,
)
RUNS_CODE = ("brings-code", "backend")  # rules: the model may run code besides ONNX Runtime's
# Rules for models of ONNX Runtime.
OF_ONNX = (
    files.version_files,
    files.stated_digests,
    backend.threshold,
    backend.warmups,
    backend.parameters,
    backend.accelerators,
)


@dataclass(frozen=True)
class Linted:
    """The findings of lint in a repository."""

    repository: Path
    models: tuple[str, ...]
    findings: tuple[Finding, ...]
    live: bool = False  # whether a server has tried to load it

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """Return the findings as values that JSON can store."""
        return {
            "repository": str(self.repository),
            "models": list(self.models),
            "live": self.live,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "findings": [{**asdict(one), "file": str(one.file)} for one in self.findings],
        }

    def __str__(self) -> str:
        names = ", ".join(self.models) or "no model"
        tried = "tried on a server" if self.live else "not tried on a server"
        errors, warnings = (_plural(self.count(level), level) for level in ("error", "warning"))
        return Lines(*self.findings, f"{names}: {errors}, {warnings}, {tried}")


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def require_clean(linted: Linted) -> None:
    """Raise CheckFailedError if there is a finding of level "error"."""
    if errors := linted.count("error"):
        found = Counter(one.rule for one in linted.findings if one.level == "error")
        raise CheckFailedError(
            f"Triton would not serve {linted.repository} rightly: {_plural(errors, 'error')} "
            f"({', '.join(found)}). Mend what is listed above, then run 'pipeline lint' again"
        )


def require_loadable(repository: Path) -> None:
    """Raise CheckFailedError with the first error, before a server loads the repository.

    A model that may run code besides ONNX Runtime's is an error too, since 'pipeline package' does
    not write such models.
    """
    findings = lint_repository(repository).findings
    errors = [one for one in findings if one.level == "error" or one.rule in RUNS_CODE]
    if errors:
        more = f" (and {_plural(len(errors) - 1, 'error')} more: 'pipeline lint')"
        raise CheckFailedError(f"{errors[0]}{more if len(errors) > 1 else ''}")


def lint_repository(repository: Path, target: Target | None = None) -> Linted:
    """Check a repository of ONNX models; return its findings, the worst first.

    `target` is the Triton release that will serve it. Raises PipelineError if there is no
    repository at that path, or if the path is the folder of a model.
    """
    if not repository.is_dir():
        raise PipelineError(f"no model repository at {repository}: run 'pipeline package' first")
    folders = sorted(entry for entry in repository.iterdir() if entry.is_dir())
    if (repository / "config.pbtxt").is_file() and any(repository.glob("[0-9]*/model.onnx")):
        raise PipelineError(
            f"{repository} is a model's own folder: lint the repository in which it lies, "
            f"{repository.absolute().parent}"
        )
    findings = [finding for folder in folders for finding in lint_model(folder, target)]
    facts = repository.stat().st_mode
    if facts & stat.S_IWOTH and not facts & stat.S_ISVTX:
        said = "is writable by everyone: anybody here can put a model there"
        findings.append(
            Finding("world-writable", "error", repository, said, f"chmod o-w {repository}")
        )
    if not folders:
        said = "holds no model; a server that has none is ready all the same"
        findings = [Finding("no-model", "error", repository, said, "run 'pipeline package'")]
    return Linted(repository, tuple(f.name for f in folders), in_order(findings))


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings without duplicates: errors first, then by file and line."""
    ranks = {"error": 0, "warning": 1, "note": 2}
    once = dict.fromkeys(findings)
    return tuple(sorted(once, key=lambda one: (ranks[one.level], str(one.file), one.line or 0)))


def lint_model(folder: Path, target: Target | None = None) -> Iterator[Finding]:
    """Check one model's folder with its config and with each of its profiles."""
    yield from files.safety(folder)
    versions, findings = files.version_folders(folder)
    yield from findings
    for version_folder in versions.values():
        yield from files.manifest(version_folder)
    read: dict[Path, Graph | None] = {}
    for path in (folder / CONFIG, *sorted((folder / PROFILES).glob("*.pbtxt"))):
        config = read_config(path) if path.exists() else Config(path)
        if isinstance(config, Finding):
            yield config
            continue
        model = ModelFolder(folder, config, versions)
        for rule in OF_ANY_BACKEND:
            yield from rule(model)
        if not files.is_onnx(config.message, folder):
            yield from _other_backend(model)
            continue
        for file in map(model.file, model.selected):
            if file.is_file() and file not in read:
                read[file], findings = read_graph(file)
                yield from findings
        graphs = {v: graph for v in model.selected if (graph := read.get(model.file(v)))}
        model = replace(model, graphs=graphs)
        for onnx_rule in OF_ONNX:
            yield from onnx_rule(model)
        for version in graphs:
            yield from tensors.described_tensors(model, version)
            yield from tensors.completion(model, version)
            yield from tensors.opset_and_ir(model, version, target)


def _other_backend(model: ModelFolder) -> Iterator[Finding]:
    """Check the backend of a model that is not for ONNX Runtime, or that states no backend."""
    message = model.config.message
    named = str(message.backend or message.platform)
    if not named:
        said = f"Could not determine backend for model '{model.folder.name}' with no backend in "
        said += "model configuration"
        fix = 'write backend: "onnxruntime", and put model.onnx into the folder 1'
        source = "core src/model_config_utils.cc AutoCompleteBackendFields"
        yield model.config.finding("backend", "error", "name", said, fix, source)
    elif meant := lint_config.backend_names(named):
        said = f"unable to find backend library for backend '{named}'"
        fix, at = f"did you mean {meant}?", "backend" if message.backend else "platform"
        source = "core src/backend_model.cc GetBackendRuntimeLibraryName"
        yield model.config.finding("backend", "error", at, said, fix, source)
    else:
        said = f"not judged: it is for the backend {named}, not for ONNX Runtime"
        yield model.config.finding("backend", "note", "backend", said, "")
