"""Lint of a model repository: applies all rules to its files, without a server."""

import functools
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.files import OTHERS_WRITE, sha256
from pipeline.core.text import Lines, format_count
from pipeline.export.targets import Target
from pipeline.repository.config_pbtxt import CONFIG, config_files
from pipeline.repository.lint import backend, files, tensors
from pipeline.repository.lint import config as lint_config
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.graph import Graph, read_graph
from pipeline.repository.lint.text import Config, Finding, read_config

# Rules for the config of any backend.
OF_ANY_BACKEND = (
    lint_config.check_name,
    lint_config.check_batching,
    lint_config.check_scheduling,
    lint_config.check_tensors,
    lint_config.check_instances,
    lint_config.check_labels,
    files.check_code,
)
RUNS_CODE = ("brings-code", "backend")  # rules: the model may run code besides ONNX Runtime's
# Rules for models of ONNX Runtime.
OF_ONNX = (
    files.check_version_files,
    files.check_stated_digests,
    backend.check_threshold,
    backend.check_warmups,
    backend.check_parameters,
    backend.check_accelerators,
)


@dataclass(frozen=True)
class LintResult:
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
            "findings": [{**asdict(f), "file": str(f.file)} for f in self.findings],
        }

    def __str__(self) -> str:
        names = ", ".join(self.models) or "no model"
        tried = "tried on a server" if self.live else "not tried on a server"
        counts = [format_count(self.count(level), level) for level in ("error", "warning")]
        return Lines(*self.findings, f"{names}: {', '.join((*counts, tried))}")


def require_clean(linted: LintResult) -> None:
    """Raise CheckFailedError if there is a finding of level "error"."""
    if errors := linted.count("error"):
        rules = ", ".join(dict.fromkeys(f.rule for f in linted.findings if f.level == "error"))
        summary = f"{format_count(errors, 'error')} ({rules}), listed above"
        raise CheckFailedError(f"Triton would not serve {linted.repository} correctly: {summary}")


def require_loadable(repository: Path) -> None:
    """Raise CheckFailedError with the first error, before a server loads the repository.

    A model that may run code besides ONNX Runtime's is an error too, since 'pipeline package' does
    not write such models.
    """
    findings = lint_repository(repository).findings
    errors = [f for f in findings if f.level == "error" or f.rule in RUNS_CODE]
    if errors:
        more = f" (and {format_count(len(errors) - 1, 'more error')}: run 'pipeline lint')"
        raise CheckFailedError(f"{errors[0]}{more if len(errors) > 1 else ''}")


def lint_repository(repository: Path, target: Target | None = None) -> LintResult:
    """Check a repository of ONNX models; return its findings, the worst first.

    `target` is the Triton release that will serve it. Raises PipelineError if there is no
    repository at that path, or if the path is the folder of a model.
    """
    if not repository.is_dir():
        raise PipelineError(f"{repository} is not a folder: run 'pipeline package' first")
    folders = sorted(entry for entry in repository.iterdir() if entry.is_dir())
    if (repository / CONFIG).is_file() and any(repository.glob("[0-9]*/model.onnx")):
        parent = repository.absolute().parent
        raise PipelineError(f"{repository} is a model: lint its repository, {parent}")
    findings = [finding for folder in folders for finding in lint_model(folder, target)]
    mode = repository.stat().st_mode
    if mode & OTHERS_WRITE and not mode & stat.S_ISVTX:
        problem, fix = "is writable by everyone: any user can add models", f"chmod o-w {repository}"
        findings.append(Finding("world-writable", "error", repository, problem, fix))
    if not folders:
        problem = "has no model; a server would be ready, but answer nothing"
        findings = [Finding("no-model", "error", repository, problem, "run 'pipeline package'")]
    return LintResult(repository, tuple(f.name for f in folders), sort_findings(findings))


def sort_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings without duplicates: errors first, then by file and line."""
    ranks = {"error": 0, "warning": 1, "note": 2}
    unique = dict.fromkeys(findings)
    return tuple(sorted(unique, key=lambda f: (ranks[f.level], str(f.file), f.line or 0)))


def lint_model(folder: Path, target: Target | None = None) -> Iterator[Finding]:
    """Check one model's folder with its config and with each of its profiles."""
    yield from files.check_safety(folder)
    versions, findings = files.list_version_folders(folder)
    yield from findings
    digest = functools.cache(sha256)
    for version_folder in versions.values():
        yield from files.check_version_manifest(version_folder, digest)
    read: dict[Path, Graph | None] = {}
    for path in config_files(folder):
        config = read_config(path) if path.exists() else Config(path)
        if isinstance(config, Finding):
            yield config
            continue
        model = ModelFolder(folder, config, versions, digest=digest, target=target)
        for rule in OF_ANY_BACKEND:
            yield from rule(model)
        if not files.is_onnx(config.message, folder):
            yield _check_other_backend(model)
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
            yield from tensors.check_described_tensors(model, version)
            yield from tensors.check_completion(model, version)
            yield from tensors.check_dialect(model, version)


def _check_other_backend(model: ModelFolder) -> Finding:
    """Return the finding on a model that is not for ONNX Runtime, or that states no backend."""
    config, name = model.config, str(model.config.message.backend or model.config.message.platform)
    if not name:
        problem = "Could not determine backend, because there is no backend in model configuration"
        fix = 'write backend: "onnxruntime", and put model.onnx into the folder 1'
        source = "core src/model_config_utils.cc AutoCompleteBackendFields"
        return config.finding("backend", "name", problem, fix, source)
    backends = {"onnxruntime", *lint_config.OTHER_BACKENDS}
    close = get_close_matches(name[: len("onnxruntime")], backends, 1)
    if name not in backends and close:
        problem = f"unable to find backend library for backend '{name}'"
        fix, at = f"did you mean {close[0]}?", "backend" if config.message.backend else "platform"
        source = "core src/backend_model.cc GetBackendRuntimeLibraryName"
        return config.finding("backend", at, problem, fix, source)
    problem = f"is not checked: the backend is {name}, not ONNX Runtime"
    return config.finding("backend", "backend", problem, "", level="note")
