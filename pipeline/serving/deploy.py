"""Files that run a packaged model on other machines: Docker Compose, Kubernetes, Prometheus."""

import base64
import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import margins
from pipeline.core.files import sha256, write_bytes
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.export import targets
from pipeline.repository import config_pbtxt
from pipeline.repository.release import REPACKAGE, Release, load_release
from pipeline.serving.tritonserver import IMAGE, KEY_HEADER, RESTRICTED

KINDS = ("compose", "kubernetes")
SAFE = "26.05"  # in older ones, one JSON request with an absurd shape crashes the server
EXIT_SECONDS = 20  # time that requests in progress have to finish
MEMORY_MIB = 2048
USER = 1000  # user ID in the container
MOST_PROBE_BYTES = 1_000_000  # a ConfigMap holds 1 MiB
_LETTERS = {"float16": "e", "float32": "f", "float64": "d"}  # format characters of Python's struct
# Where each kind has its alerts, from a template that both share.
_ALERTS = {"compose": "alerts.yml", "kubernetes": "prometheus/alerts.yml"}
_ENVIRONMENT = Environment(
    loader=PackageLoader("pipeline.serving"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    # Not braces: Prometheus uses braces in its own templates.
    block_start_string="[%",
    block_end_string="%]",
    variable_start_string="[[",
    variable_end_string="]]",
)


@dataclass(frozen=True)
class Deployment:
    """The files that were written for a packaged version, and how to use them."""

    kind: str
    name: str
    version: int
    sha256: str  # of its model.onnx
    image: str  # of the container
    files: tuple[Path, ...]
    warning: str
    then: str

    def __str__(self) -> str:
        what = f"{self.name} version {self.version}, sha256 {self.sha256[:12]}, {self.image}"
        wrote = (f"wrote {path}" for path in self.files)
        warning = [self.warning] if self.warning else []
        return Lines(*wrote, f"The files are for {what}; nothing was packaged", *warning)


def write_deployment(paths: Paths, kind: str, release: str | None = None) -> Deployment:
    """Write the files that run the selected version of a packaged model on a Triton release.

    `kind` is compose or kubernetes. Raises PipelineError if nothing is packaged, if the Triton
    release cannot load the model or if an image is too large for a probe, and CorruptError if a
    packaged file changed.
    """
    config = config_pbtxt.read(paths.packaged / config_pbtxt.CONFIG)
    version = config_pbtxt.selected_version(config)
    if version is None:
        raise PipelineError(f"{paths.packaged} does not select a version: {REPACKAGE}")
    packaged, folder = load_release(paths, version), paths.deployment(kind)
    image = _choose_image(packaged, release)
    probe = _make_probe(paths.name, config, packaged)
    values = {**probe, **_make_values(paths, kind, config, packaged), "image": image}
    names = [name for name in _ENVIRONMENT.list_templates() if name.startswith(f"{kind}/")]
    sources = {name.removeprefix(f"{kind}/"): name for name in names}
    contents = {
        name: _ENVIRONMENT.get_template(source).render(values).encode()
        for name, source in {**sources, _ALERTS[kind]: "shared/alerts.yml"}.items()
    }
    digit = base64.b64decode(probe["probe_image"])
    if kind == "compose":  # Kubernetes gets both from a ConfigMap
        contents |= {"probe/probe.py": probe["probe_program"].encode(), "probe/image": digit}
    elif len(probe["probe_image"]) > MOST_PROBE_BYTES:
        size = f"an image of {paths.name} has {len(digit):,} bytes"
        raise PipelineError(f"{size}, too many for the ConfigMap of a probe: use the compose files")
    for name, content in contents.items():
        write_bytes(folder / name, content)
    warnings = [_warn_if_unreadable(paths, kind)]
    if release and release < SAFE:
        problem = "one request with an absurd shape can end it: let only trusted clients reach it"
        warnings.insert(0, f"Triton {release} is older than {SAFE}, and {problem}")
    compose, fill, manifests = (
        shlex.quote(str(folder / name)) for name in ("compose.yaml", "fill.yaml", "manifests")
    )
    key, up = "$(openssl rand -hex 24)", "--profile cpu up --detach --wait"
    commands = {
        "compose": f"TRITON_ADMIN_KEY={key} docker compose -f {compose} {up}",
        "kubernetes": f"kubectl create secret generic {values['service']}-admin "
        f"--from-literal=key={key}, {fill} says how to fill the volume, kubectl apply -f "
        f"{manifests}",
    }
    return Deployment(
        kind=kind,
        name=paths.name,
        version=version,
        sha256=packaged.sha256,
        image=image,
        files=tuple(folder / name for name in sorted(contents)),
        warning=Lines(*filter(None, warnings)),
        then=commands[kind],
    )


def _choose_image(packaged: Release, release: str | None) -> str:
    """Return NVIDIA's image of that release, or the default; PipelineError if it is too old."""
    repository, _, tag = IMAGE.partition(":")
    triton = targets.target(release or tag.removesuffix("-py3"))
    opset, ir_version = packaged.manifest["opset"], packaged.manifest["ir_version"]
    if opset > triton.opset or ir_version > triton.ir_version:
        oldest = targets.find_oldest(opset, ir_version)
        later = f"Use Triton {oldest.releases} or later, or export" if oldest else "Export"
        raise PipelineError(
            f"Triton {triton.releases} cannot load {packaged.folder}: the model has opset {opset} "
            f"and IR {ir_version}, but the release's ONNX Runtime {triton.onnxruntime} loads only "
            f"opset {triton.opset} and IR {triton.ir_version} or lower. {later} it with "
            f"--target-triton {triton.releases}, validate it and package it"
        )
    return f"{repository}:{triton.releases}-py3"


def _make_probe(name: str, config: config_pbtxt.ModelConfig, packaged: Release) -> dict[str, Any]:
    """Return the templates' values of the health check: its program, its image, its arguments."""
    dtype = config_pbtxt.dtype(config.output[0])
    if dtype not in _LETTERS:
        raise PipelineError(f"a health check reads {', '.join(_LETTERS)}; the outputs are {dtype}")
    # The health check sends the image with the largest margin.
    row = int(margins(packaged.golden.outputs).argmax())
    digit, answer = packaged.golden.images[row].tobytes(), packaged.golden.outputs[row].argmax()
    program = (Path(__file__).parent / "templates/shared/probe.py").read_text("utf-8")
    url = f"http://127.0.0.1:8000/v2/models/{name}/infer"
    arguments = ["/probe/probe.py", url, "/probe/image", str(answer), _LETTERS[dtype]]
    return {
        "probe": [json.dumps(argument) for argument in arguments],  # of python3
        "probe_program": program,
        "probe_image": base64.b64encode(digit).decode(),
        "probe_sha256": sha256(program.encode() + digit),
    }


def _make_values(
    paths: Paths, kind: str, config: config_pbtxt.ModelConfig, packaged: Release
) -> dict[str, Any]:
    """Return the templates' values of the server and its model."""
    slug = re.sub(r"[^a-z0-9]+", "-", paths.name.lower())[:40].strip("-")
    service = f"triton-{slug}"
    # Each release has its own folder: a pod always finds a complete one, also after a rollback.
    files = sorted(path for path in paths.packaged.rglob("*") if path.is_file())
    digest = sha256("".join(sha256(path) for path in files).encode())
    models = "/models" if kind == "compose" else f"/models/{packaged.version}-{digest[:12]}"
    key = "$(TRITON_ADMIN_KEY)"
    if kind == "compose":
        key = "${TRITON_ADMIN_KEY:?is not set, see the top of compose.yaml}"
    # Escape "$", so that Compose finds no variable in this YAML string.
    source = os.path.relpath(paths.packaged, paths.deployment(kind)).replace("$", "$$")
    source = source if source.startswith((".", "/")) else f"./{source}"
    threads = config_pbtxt.thread_count(config) or 1
    instances = sum(group.count for group in config.instance_group) or 1
    delay_us = int(config.dynamic_batching.max_queue_delay_microseconds)
    scale_us = max(2000, 4 * delay_us)
    return {
        "name": paths.name,
        "version": packaged.version,
        "sha256": packaged.sha256,
        "slug": slug,  # the name in the characters that Kubernetes and Compose allow
        "service": service,
        "selector": f'job="{service}",model="{paths.name}"',  # of the model's Prometheus series
        "queue_metric": f"{service.replace('-', '_')}_queue_time_us",
        "repository": IMAGE.partition(":")[0],  # the image without its tag
        "folder": shlex.quote(str(paths.repository)),  # the repository's folder, quoted for a shell
        "source": json.dumps(source),  # the model's folder, relative to the compose file
        "arguments": [  # of tritonserver
            f"--model-repository={models}",
            "--model-control-mode=explicit",
            f"--load-model={paths.name}",
            f"--exit-timeout-secs={EXIT_SECONDS}",
            f"--http-restricted-api={RESTRICTED}:{KEY_HEADER}={key}",
            f"--grpc-restricted-protocol={RESTRICTED}:{KEY_HEADER}={key}",
        ],
        "models": models,  # the repository's folder in the container
        "exit_seconds": EXIT_SECONDS,
        "cpus": math.ceil(threads * instances) + 1,  # one for the front ends
        "memory_mib": MEMORY_MIB,
        "delay_us": delay_us,  # longest time that a request waits to be batched
        "scale_us": scale_us,  # mean queue time that the autoscaler aims at
        "alert_us": 5 * scale_us,  # mean queue time that raises an alert
    }


def _warn_if_unreadable(paths: Paths, kind: str) -> str:
    """Return a warning if the container's user cannot read a file that Compose mounts, or ""."""
    for path in (paths.packaged, *paths.packaged.rglob("*"), *paths.deployment(kind).rglob("*")):
        needed = 0o005 if path.is_dir() else 0o004
        if kind == "compose" and path.stat().st_mode & needed != needed:
            folders = shlex.join(map(str, (paths.packaged, paths.deployment(kind))))
            fix = f"run 'chmod -R o+rX {folders}', or set user: to yourself in compose.yaml"
            return f"user {USER} in the container cannot read {path}: {fix}"
    return ""
