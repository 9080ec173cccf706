"""Would Triton load this model repository, and serve it rightly? Told from the files alone."""

import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import lint_accelerators, lint_backend, lint_config, lint_files, lint_rules
from pipeline.errors import CheckFailedError, PipelineError
from pipeline.lint_files import Model
from pipeline.lint_graph import Graph, read_graph
from pipeline.lint_text import Config, Finding, read_config
from pipeline.targets import Target
from pipeline.text import Lines

CONFIG, PROFILES = "config.pbtxt", "configs"
# Rules that look at a config, whatever its backend; those that also need its graph are in _graphs.
OF_ANY_BACKEND = (
    lint_config.identity,
    lint_config.batching,
    lint_config.scheduling,
    lint_config.tensors,
    lint_config.instances,
    lint_config.labels,
    lint_files.code,
)
RUNS_CODE = ("brings-code", "backend")  # rules
OF_ONNX = (
    lint_files.version_files,
    lint_files.digests,
    lint_backend.threshold,
    lint_backend.warmups,
    lint_backend.parameters,
    lint_accelerators.accelerators,
    lint_accelerators.overwritten,
)


@dataclass(frozen=True)
class Linted:
    """What lint has to say of a repository."""

    repository: Path
    models: tuple[str, ...]
    findings: tuple[Finding, ...]
    live: bool = False  # whether a server tried it

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """The findings as JSON would have them."""
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
        counts = (
            f"{_plural(self.count('error'), 'error')}, {_plural(self.count('warning'), 'warning')}"
        )
        return Lines(*self.findings, f"{names}: {counts}, {tried}")


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def require_clean(linted: Linted) -> None:
    """Raise CheckFailedError where there is an error."""
    if errors := linted.count("error"):
        found = Counter(one.rule for one in linted.findings if one.level == "error")
        raise CheckFailedError(
            f"Triton would not serve {linted.repository} rightly: {_plural(errors, 'error')} "
            f"({', '.join(found)}). Mend what is listed above, then run 'pipeline lint' again"
        )


def require_loadable(repository: Path) -> None:
    """Raise CheckFailedError with the first error, so that no server stumbles over it.

    A model that may run more than ONNX Runtime is one too: 'pipeline package' writes none.
    """
    findings = lint(repository).findings
    errors = [one for one in findings if one.level == "error" or one.rule in RUNS_CODE]
    if errors:
        more = f" (and {_plural(len(errors) - 1, 'error')} more: 'pipeline lint')"
        raise CheckFailedError(f"{errors[0]}{more if len(errors) > 1 else ''}")


def model_folders(repository: Path) -> list[Path]:
    """The folders that Triton takes for models; PipelineError when it is no repository."""
    if not repository.is_dir():
        raise PipelineError(f"no model repository at {repository}: run 'pipeline package' first")
    return sorted(entry for entry in repository.iterdir() if entry.is_dir())


def lint(repository: Path, target: Target | None = None) -> Linted:
    """All that Triton would stumble over in a repository of ONNX models, the worst first.

    `target` is the Triton release that is to serve it. Raises PipelineError when there is none.
    """
    folders = model_folders(repository)
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
        fix = "run 'pipeline package'"
        findings = [Finding("no-model", "error", repository, said, fix)]
    return Linted(repository, tuple(f.name for f in folders), tuple(in_order(findings)))


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Each finding once: errors first, then as they stand in the files."""
    levels = ("error", "warning", "note")

    def place(one: Finding) -> tuple[int, str, int]:
        return levels.index(one.level), str(one.file), one.line or 0

    return sorted(dict.fromkeys(findings), key=place)


def lint_model(folder: Path, target: Target | None = None) -> Iterator[Finding]:
    """What is wrong with one model's folder, in its config and in each of its profiles."""
    yield from lint_files.safety(folder)
    versions, findings = lint_files.versions(folder)
    yield from findings
    for path in versions.values():
        yield from lint_files.manifest(path)
    read: dict[Path, Graph | None] = {}
    path = folder / CONFIG
    profiles = sorted((folder / PROFILES).glob("*.pbtxt"))
    for place in [path, *profiles]:
        config = read_config(place) if place.exists() else Config(place)
        if isinstance(config, Finding):
            yield config
        else:
            yield from _lint_config(Model(folder, config, versions), read, target)


def _lint_config(
    model: Model, read: dict[Path, Graph | None], target: Target | None
) -> Iterator[Finding]:
    for rule in OF_ANY_BACKEND:
        yield from rule(model)
    if not lint_files.is_onnx(model.config.message, model.folder):
        yield from _other_backend(model)
        return
    graphs = {}
    for version in model.selected:
        file = model.file(version)
        if file.is_file() and file not in read:
            read[file], findings = read_graph(file)
            yield from findings
        if graph := read.get(file):
            graphs[version] = graph
    model = replace(model, graphs=graphs)
    for onnx_rule in OF_ONNX:
        yield from onnx_rule(model)
    for version in graphs:
        yield from lint_rules.signature(model, version)
        yield from lint_rules.completion(model, version)
        yield from lint_rules.dialect(model, version, target)


def _other_backend(model: Model) -> Iterator[Finding]:
    """A model that is not for ONNX Runtime, or whose backend nobody can tell."""
    message = model.config.message
    named = str(message.backend or message.platform)
    if not named:
        said = f"Could not determine backend for model '{model.folder.name}' with no backend in "
        fix = 'write backend: "onnxruntime", and put model.onnx into the folder 1'
        yield model.config.finding(
            "backend", "error", "name", f"{said}model configuration", fix,
            "core src/model_config_utils.cc AutoCompleteBackendFields",
        )  # fmt: skip
    elif meant := lint_config.backend_names(named):
        said = f"unable to find backend library for backend '{named}'"
        fix, at = f"did you mean {meant}?", "backend" if message.backend else "platform"
        source = "core src/backend_model.cc GetBackendRuntimeLibraryName"
        yield model.config.finding("backend", "error", at, said, fix, source)
    else:
        said = f"not judged: it is for the backend {named}, not for ONNX Runtime"
        yield model.config.finding("backend", "note", "backend", said, "")
