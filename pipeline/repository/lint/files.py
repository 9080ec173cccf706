"""Rules for a model's folders as Triton reads them: versions, files, permissions, digests."""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.files import OTHERS_WRITE, sha256
from pipeline.export.targets import Target
from pipeline.repository import config_pbtxt
from pipeline.repository.lint.graph import Graph
from pipeline.repository.lint.text import Config, Finding, Level

ONNX = "model.onnx"  # if the config names no other file
DEFAULT_BATCH = 4  # filled in by Triton if the config does not describe the tensors
LARGEST_VERSION = 2**63 - 1
VERSIONS = "core src/model_repository_manager/model_lifecycle.cc VersionsToLoad"
# As std::stoll parses: a numeric prefix is enough.
_INTEGER = re.compile(r"\s*([+-]?[0-9]+)", re.ASCII)
_REPACKAGE = "package it again, or restore the original file"


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder with one of its configs and the graphs of its versions."""

    folder: Path
    config: Config
    versions: Mapping[int, Path]  # number -> folder, as Triton reads them
    graphs: Mapping[int, Graph] = field(default_factory=dict)
    digest: Callable[[Path], str] = sha256  # of a file; cached where several configs are checked
    target: Target | None = None  # the Triton release that will serve it, if it is stated

    @property
    def filename(self) -> str:
        return str(self.config.message.default_model_filename) or ONNX

    @property
    def is_complete(self) -> bool:
        """Whether the config describes its tensors; if not, Triton fills in what is missing."""
        return bool(self.config.message.input and self.config.message.output)

    @property
    def max_batch_size(self) -> int:
        """The largest batch size: as stated, or as Triton fills it in; 0 means no batching."""
        stated = int(self.config.message.max_batch_size)
        graphs = self.graphs.values()
        if stated or self.is_complete or not graphs:
            return stated
        return DEFAULT_BATCH if all(graph.can_batch for graph in graphs) else 0

    def file(self, version: int) -> Path:
        """Return the path of a version's file; a large model may be a folder that contains it."""
        # Triton only appends, so an absolute path is one in the version's folder too.
        path = self.versions[version] / self.filename.lstrip("/")
        return path / ONNX if path.is_dir() else path

    @property
    def selected(self) -> list[int]:
        """The versions that Triton would load."""
        policy = self.config.message.version_policy
        choice = policy.WhichOneof("policy_choice")
        if choice == "specific":
            return [version for version in policy.specific.versions if version in self.versions]
        newest = sorted(self.versions, reverse=True)
        count = policy.latest.num_versions if choice == "latest" else 1
        return newest if choice == "all" else newest[:count]


def is_onnx(config: Any, folder: Path) -> bool:
    """Return whether Triton uses its onnxruntime backend for the model."""
    if config.backend or config.platform:
        return str(config.backend or config.platform) in ("onnxruntime", "onnxruntime_onnx")
    if config.default_model_filename:
        return str(config.default_model_filename) == ONNX
    first = min((entry.name for entry in folder.iterdir() if entry.is_dir()), default="")
    return (folder / first / ONNX).exists()


def list_version_folders(folder: Path) -> tuple[dict[int, Path], list[Finding]]:
    """Return the versions in a model's folder as Triton reads them, and findings on wrong names."""
    versions: dict[int, Path] = {}
    findings: list[Finding] = []
    for entry in sorted(folder.iterdir()):
        name, problem, fix = entry.name, "", ""
        level: Level = "warning"
        if not entry.is_dir() or name in ("warmup", "configs", "initial_state"):
            continue
        number = _INTEGER.match(name)
        if name.startswith("0") and len(name) > 1:
            problem = f"ignore version directory '{name}' which contains leading zeros"
            fix = f"rename it to {name.lstrip('0') or '0'}"
        elif not number and re.search(r"[0-9]", name) and not name.startswith("."):
            problem = f"ignore version directory '{name}' which fails to convert to integral number"
            fix = "rename it to the version's number"
        elif number and abs(version := int(number[1])) > LARGEST_VERSION:
            problem, level = f"the number '{name}' is too large, and crashes the server", "error"
            fix = "rename it"
        elif number:
            versions[version] = folder / str(version)
            if name != str(version):
                problem = f"Triton reads the folder '{name}' as version {version}"
                if not versions[version].is_dir():
                    problem += f", but looks for its files in '{version}', which does not exist"
                fix = "rename it, or move it elsewhere"
        if problem:
            findings.append(Finding("version-name", level, entry, problem, fix, source=VERSIONS))
    return versions, findings


def check_version_files(model: ModelFolder) -> Iterator[Finding]:
    """Check that the versions that the policy selects exist and contain the model's file."""
    config, chosen = model.config, model.selected
    have = f"versions there: {', '.join(map(str, sorted(model.versions))) or 'none'}"
    for index, version in enumerate(config.message.version_policy.specific.versions):
        if version not in model.versions:
            problem = f"version {version} is specified, but the version directory is not present"
            at = f"version_policy.specific.versions[{index}]"
            yield config.finding("version-missing", at, problem, have, VERSIONS)
    if not chosen:
        problem = "at least one version must be available under the version policy"
        put = f"put the model into {model.folder / '1' / model.filename}"
        is_latest = config.message.version_policy.HasField("latest")
        fix = ("write num_versions: 1" if is_latest else have) if model.versions else put
        yield config.finding("no-version", "version_policy", problem, fix, VERSIONS)
    for version, path in model.versions.items():
        if (version in chosen or path.is_dir()) and not model.file(version).is_file():
            file = model.file(version).relative_to(model.folder)
            level: Level = "error" if version in chosen else "warning"
            problem = f"unable to find '{file}', without which the server may never start"
            if version not in chosen:
                problem += " once the version policy selects the version"
            fix = f"put {model.filename} there, remove the folder, or set default_model_filename"
            if model.filename.startswith("/"):
                fix = "Triton appends it to the version's path: write the name alone"
            source = "onnxruntime_backend src/onnxruntime.cc LoadModel"
            yield Finding("model-file", level, path, problem, fix, source=source)


def check_safety(folder: Path) -> Iterator[Finding]:
    """Check for links, files that are not regular, and files that everyone may write to."""
    writable: list[Path] = []
    for path in [folder, *sorted(folder.rglob("*"))]:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            problem = f"is a link to '{os.readlink(path)}', which can change without notice"
            yield Finding("link", "error", path, problem, "replace it with a copy")
        elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            problem = "is neither a file nor a folder: reading it can hang the server"
            yield Finding("file-kind", "error", path, problem, "remove it")
        elif mode & OTHERS_WRITE:
            writable.append(path)
    if writable:
        more = f", like {len(writable) - 1} others in this model" if writable[1:] else ""
        problem = f"is writable by everyone{more}: any user here can change the served model"
        yield Finding("world-writable", "error", writable[0], problem, f"chmod -R o-w {folder}")


def check_code(model: ModelFolder) -> Iterator[Finding]:
    """Check for anything that makes the server run code that came with the model."""
    for folder in (model.folder, *model.versions.values()):
        # Libraries that Triton loads because of their names.
        for path in (*folder.glob("libtriton_*.so"), *folder.glob("batchstrategy.so")):
            problem = "is native code that Triton loads into the server with this model"
            source = "core src/backend_model.cc GetBackendLibrarySearchPaths"
            fix = "remove it, unless you wrote it"
            yield Finding("brings-code", "warning", path, problem, fix, source=source)
    message = model.config.message
    code: list[tuple[str, str]] = []  # the fields that name code to run, and what they name
    for index, name in enumerate(message.model_operations.op_library_filename):
        code.append((f"model_operations.op_library_filename[{index}]", f"the code in '{name}'"))
    for index, agent in enumerate(message.model_repository_agents.agents):
        code.append((f"model_repository_agents.agents[{index}]", f"the agent '{agent.name}'"))
    if message.runtime:
        code.append(("runtime", f"'{message.runtime}'"))
    for key in ("EXECUTION_ENV_PATH", "TRITON_BATCH_STRATEGY_PATH"):
        if key in message.parameters:
            code.append((f"parameters[{key}]", f"the file that {key} names"))
    for command in config_pbtxt.find_commands(model.folder, message):
        code.append(("instance_group", command))
    for at, name in code:
        problem, fix = f"the server may run {name}", "remove it, unless you trust it"
        yield model.config.finding("brings-code", at, problem, fix, level="warning")


def brings_code(model: ModelFolder) -> bool:
    """Return whether loading the model might run code other than that of Triton's own backends."""
    message: Any = model.config.message
    if any(check_code(model)):
        return True
    if is_onnx(message, model.folder):
        return False
    if message.backend:  # Triton looks for it in a folder of that name
        return re.fullmatch(r"\w+", message.backend) is None
    # Triton guesses the backend from the files, else from the ending of the folder's name.
    return "." in model.folder.name or any(model.folder.rglob("*.py"))


def check_stated_digests(model: ModelFolder) -> Iterator[Finding]:
    """Check the versions' files against the digests that the config states."""
    for key, value in model.config.message.parameters.items():
        version = key.removeprefix("sha256.")
        if version == key or not re.fullmatch("[0-9]{1,18}", version):
            continue
        at, stated = f"parameters[{key}]", value.string_value
        if int(version) not in model.versions:
            problem = f"version {version}, whose digest is stated, does not exist"
            yield model.config.finding("digest", at, problem, "remove it", level="warning")
        elif model.file(int(version)).is_file():
            actual = model.digest(model.file(int(version)))
            if actual != stated:
                problem = f"version {version} has digest {actual[:12]}, not '{stated[:12]}' as here"
                yield model.config.finding("digest", at, problem, _REPACKAGE)


def check_version_manifest(folder: Path, digest: Callable[[Path], str]) -> Iterator[Finding]:
    """Check a version's files against its manifest, if it has one that the pipeline wrote."""
    path = folder / "manifest.json"
    try:
        files = json.loads(path.read_bytes())["files"]
        stated = {Path(str(name)).name: str(listed) for name, listed in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no manifest, or a third-party one
    for name, listed in stated.items():
        if not re.fullmatch("[0-9a-f]{64}", listed):
            return
        file = folder / name
        if not file.is_file():
            problem = f"lists '{name}', which does not exist"
            yield Finding("digest", "error", path, problem, _REPACKAGE)
        elif digest(file) != listed:
            problem = f"does not match its digest in {path.name} ({listed[:12]})"
            yield Finding("digest", "error", file, problem, _REPACKAGE)
