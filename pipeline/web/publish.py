"""The page as a folder for any web host: the released model runs in the visitor's browser."""

import gzip
import json
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.files import check_digest, create_folder, remove, write_bytes
from pipeline.core.paths import Paths, format_make, packaged_name
from pipeline.data.splits import load_scored_split
from pipeline.repository import config_pbtxt
from pipeline.repository.release import load_release, require_selected

RUNTIME = "onnxruntime-web@1.30.0"  # an npm package, and the SHA-256 of what the page needs of it
_WASM = "ort-wasm-simd-threaded"
RUNTIME_FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    f"{_WASM}.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    f"{_WASM}.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_RECORD = "release.json"  # marks a folder that we wrote
_BEGIN, _END = "<!-- with a gateway -->", "<!-- /with a gateway -->"


def publish_page(paths: Paths, folder: Path, with_test_images: bool = False) -> dict[str, Any]:
    """Write the page with the selected exact release into `folder`, which it replaces as a whole.

    Returns the record of the release that the page reads. Raises PipelineError if there is no exact
    release, if its pictures are not digits, if the folder has other content or if ONNX Runtime's
    files are missing; CorruptError for other bytes of these; and what `load_release` raises.
    """
    paths = paths.named(packaged_name(paths.name, "exact"))
    if folder.exists() and any(folder.iterdir()) and not (folder / _RECORD).exists():
        raise PipelineError(f"{folder} has other files: name a new folder, or an empty one")
    path = paths.packaged / config_pbtxt.CONFIG
    if not path.exists():
        raise PipelineError(
            f"{paths.repository} has no {paths.name}, and other models are not equal in every "
            "browser: run 'pipeline export --precision fp32,exact', 'pipeline validate' and "
            "'pipeline package'"
        )
    config = config_pbtxt.read(path)
    if config_pbtxt.pictures(config) != "digit":
        raise PipelineError(f"{paths.name} does not take digits, the only pictures of this page")
    release = load_release(paths, require_selected(path, config), [(path, config)])
    manifest = release.manifest
    sets = {"golden": (release.golden.images, manifest["exact_golden_sha256"])}
    if with_test_images:
        training, digests = manifest["training"], manifest["data_sha256"]
        test = load_scored_split(training, digests, paths.data(training["dataset"]))
        sets["test"] = (test.images, manifest["exact_sha256"])
    record = {
        "model": paths.name,
        "version": str(release.version),
        "sha256": release.sha256,
        "classes": config_pbtxt.classes(config),
        "min_probability": config_pbtxt.min_probability(config),
        "checks": [
            {"name": name, "images": len(images), "sha256": digest}
            for name, (images, digest) in sets.items()
        ],
    }
    contents = _read_page() | {"model.onnx": release.onnx, _RECORD: json.dumps(record).encode()}
    for name, (images, _) in sets.items():
        contents[f"{name}.bin"] = gzip.compress(images.tobytes(), mtime=0)
    cache = runtime_folder(paths)
    fix = f"run '{format_make('web-runtime')}', or put {RUNTIME}'s files of that name there"
    for name, digest in RUNTIME_FILES.items():  # not every web host knows what .mjs is
        contents[f"ort/{name.replace('.mjs', '.js')}"] = check_digest(cache / name, digest, fix)
    with create_folder(folder) as new:
        for name, content in contents.items():
            write_bytes(new / name, content)
        remove(folder)
    return record


def _read_page() -> dict[str, bytes]:
    """Return the page's files by name, with the check in place of what only a gateway offers."""
    folders = [Path(__file__).parent / name for name in ("page", "static")]  # the later one counts
    contents = {file.name: file.read_bytes() for folder in folders for file in folder.iterdir()}
    before, rest = contents["index.html"].decode().split(_BEGIN)
    html = before + contents.pop("proof.html").decode().strip() + rest.split(_END)[1]
    del contents["programs.js"]
    return contents | {"index.html": html.encode()}


def runtime_folder(paths: Paths) -> Path:
    """Return the folder of ONNX Runtime's files for browsers."""
    return paths.root / "data" / RUNTIME.replace("@", "-")
