"""Prove that a packaged exact model has one digest on every runtime, and that changes are found.

Run by `make prove-exact`. Asks ONNX Runtime here and those inside older Tritons at every level of
optimization, eager PyTorch, numpy's int64, and a temporary Triton; then plants changes in the file.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from pipeline.client.client import Client
from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import find_unequal, hash_scores, predict
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.signature import SCORES, TensorSpec
from pipeline.export import exact
from pipeline.export.exact import LARGEST_SUM, require_bounds, to_exact
from pipeline.export.export import export_program
from pipeline.export.runtime import onnx_predictor
from pipeline.export.sample import Sample
from pipeline.export.subject import load_sample, load_subject
from pipeline.export.variants import CALIBRATION_IMAGES
from pipeline.repository.release import Release, load_selected_releases
from pipeline.serving.serve import run_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.validation.compare import probe_images
from pipeline.validation.exact import scores_predictor
from tools.edge import make_result_parser, print_now, run_tool
from tools.prove_runtimes import RUNTIMES, environment
from tools.provenance import write_figure
from tools.readme import render_pages
from tools.whole_numbers import whole_scores

RUNNER = Path(__file__).parent / "run_exact.py"
SIZES = (1, 64, 1000)
EAGER_SIZES = (7, 64, 1000)
CONCURRENCY = 16


@dataclass(frozen=True)
class Row:
    """The digests that a runtime gave in its runs over all test images."""

    runtime: str
    what: str  # which levels, threads and batch sizes
    runs: int
    digests: tuple[str, ...]  # distinct, of the exact model's scores
    float_digests: int | None = None  # distinct ones of the fp32 file's answers, in as many runs

    @classmethod
    def of(cls, runtime: str, what: str, digests: list[str], floats: int | None = None) -> "Row":
        row = cls(runtime, what, len(digests), tuple(sorted(set(digests))), floats)
        print_now(f"  {row}")
        return row

    def __str__(self) -> str:
        digests = ", ".join(digest[:12] for digest in self.digests)
        floats = "" if self.float_digests is None else f"; fp32: {self.float_digests}"
        return f"{self.runtime} ({self.what}): {self.runs} runs, {digests}{floats}"


def run_runtime(python: Path, exact: bytes, fp32: bytes, images: np.ndarray) -> Row:
    """Run both files in another Python at every level, with one and two threads."""
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        file, pixels = Path(folder) / "model.onnx", Path(folder) / "images.npy"
        np.save(pixels, images)
        for content, output in ((exact, SCORES), (fp32, "log_probabilities")):
            file.write_bytes(content)
            paths = map(str, (python, "-I", RUNNER, file, pixels))
            command = [*paths, output, *map(str, SIZES)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CheckFailedError(f"{python} does not run the model: {done.stderr[-300:]}")
            answers.append(json.loads(done.stdout))
    what = f"4 levels, 1 and 2 threads, batches of {', '.join(map(str, SIZES))}"
    floats = len(set(answers[1]["digests"]))
    return Row.of(f"ONNX Runtime {answers[0]['onnxruntime']}", what, answers[0]["digests"], floats)


def run_eager(network: nn.Module, images: np.ndarray, has_nnpack: bool, *dtypes: Any) -> list[str]:
    """Return the digests of eager PyTorch; with NNPACK, which it takes where oneDNN is off."""
    digests = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration", UserWarning)  # on any change
        torch.backends.mkldnn.set_flags(not has_nnpack)  # type: ignore[no-untyped-call]
    for dtype in dtypes:
        predictor, threads = scores_predictor(network, dtype, has_nnpack), torch.get_num_threads()
        for count in (1, 2):
            torch.set_num_threads(count)
            digests += [hash_scores(predict(predictor, images, size)) for size in EAGER_SIZES]
        torch.set_num_threads(threads)
    torch.backends.mkldnn.set_flags(True)  # type: ignore[no-untyped-call]
    return digests


def count_right(network: nn.Module, sample: Sample) -> int:
    """Return how many images an exact network classifies correctly."""
    with torch.inference_mode(), torch.backends.nnpack.flags(enabled=False):
        outputs = predict(lambda rows: network(torch.from_numpy(rows))[0].numpy(), sample.images)
    return int((outputs.argmax(axis=1) == sample.labels).sum())


def ask_served(url: str, name: str, images: np.ndarray) -> str:
    """Return the digest of a server's scores, asked from 16 threads in batches of 1 to 16."""
    rng, ends = np.random.default_rng(0), [0]
    while ends[-1] < len(images):
        ends.append(min(len(images), ends[-1] + int(rng.integers(1, CONCURRENCY + 1))))
    batches = [images[start:end] for start, end in itertools.pairwise(ends)]
    with Client(url, name, 60.0) as client, ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(pool.map(lambda batch: client.infer(batch, output=SCORES)[0], batches))
    return hash_scores(np.concatenate(answers))


def plant_changes(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield copies of an exact file with one thing changed, and what it is."""
    original = onnx.load_model_from_string(content)
    stored = {tensor.name for tensor in original.graph.initializer}

    def change(node: int, argument: int, edit: Callable[[np.ndarray], np.ndarray]) -> bytes:
        model = onnx.load_model_from_string(content)
        name = model.graph.node[node].input[argument]
        (tensor,) = (each for each in model.graph.initializer if each.name == name)
        values = edit(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        return model.SerializeToString()

    def replace(node: int, operator: str) -> bytes:
        model = onnx.load_model_from_string(content)
        part = model.graph.node[node]
        part.op_type = operator
        if operator == "Identity":
            del part.input[1:], part.attribute[:]
        return model.SerializeToString()

    def add_one(values: np.ndarray) -> np.ndarray:
        values.flat[np.abs(values).argmax()] += 1
        return values

    for index, node in enumerate(original.graph.node):
        where = f"{node.op_type} {index}"
        if any(SCORES in output for output in node.output):
            break
        if node.op_type in ("Conv", "Gemm"):
            yield f"{where}: a weight more by 1", change(index, 1, add_one)
            yield f"{where}: biases more by 1", change(index, 2, lambda values: values + 1)
        elif node.op_type == "Mul" and node.input[1] in stored:
            yield f"{where}: a shift less by 1", change(index, 1, lambda v: _first(v, 2.0))
            yield f"{where}: a shift more by 1", change(index, 1, lambda v: _first(v, 0.5))
        elif node.op_type == "Floor":
            yield f"{where}: round instead of floor", replace(index, "Round")
            yield f"{where}: ceil instead of floor", replace(index, "Ceil")
            yield f"{where}: no floor", replace(index, "Identity")
        elif node.op_type == "Clip":
            yield f"{where}: no clip", replace(index, "Identity")


def _first(values: np.ndarray, factor: float) -> np.ndarray:
    values.flat[0] *= factor
    return values


def find_planted(
    content: bytes, network: Any, images: TensorSpec, rows: np.ndarray
) -> list[dict[str, str]]:
    """Return each planted change with how it was found; "NOT found" if it was not."""
    expected = predict(onnx_predictor(content, outputs=(1,)), rows)
    planted = []
    for what, changed in plant_changes(content):
        found = find_unequal(expected, predict(onnx_predictor(changed, outputs=(1,)), rows))
        planted.append({"what": what, "found": f"unequal: {found}" if found else "NOT found"})
    for name, layer in network.named_children():
        kept, found = layer.bias[0].item(), "NOT found"
        layer.bias[0] = LARGEST_SUM
        try:
            require_bounds(network, images)
        except CheckFailedError as error:
            found = f"refused: {error}"
        layer.bias[0] = kept
        planted.append({"what": f"{name}: an accumulator over its bound", "found": found})
    return planted


def measure(paths: Paths, release: Release) -> dict[str, Any]:
    """Run the release on every runtime, and plant changes in it."""
    manifest = release.manifest
    exported = paths.named(manifest["name"])
    subject, sample = load_subject(exported, manifest), load_sample(exported, manifest)
    images, fp32 = sample.images, exported.onnx.read_bytes()
    program = export_program(subject.model, subject.images)
    calibration = sample.calibration[:CALIBRATION_IMAGES]
    network = to_exact(program, calibration)
    with mock.patch.object(exact, "LARGEST_FACTOR", LARGEST_SUM - 1):  # TF32 would round these
        wider = to_exact(program, calibration)
    pythons = [Path(sys.executable), *map(environment, RUNTIMES)]
    rows = [run_runtime(python, release.onnx, fp32, images) for python in pythons]
    what = f"1 and 2 threads, batches of {', '.join(map(str, EAGER_SIZES))}"
    digests = run_eager(network, images, False, torch.float32, torch.float64)
    rows.append(Row.of("eager PyTorch", f"float32 and float64, {what}", digests))
    rows.append(Row.of("numpy", "int64", [hash_scores(whole_scores(release.onnx, images))]))
    with run_server(paths, with_free_ports(ServeConfig()), report=print_now) as (server, _):
        for url in (server.http_url, server.grpc_url):
            how = f"{CONCURRENCY} threads, batches of 1 to {CONCURRENCY}"
            protocol = "gRPC" if url.startswith("grpc") else "HTTP"
            digest = ask_served(url, paths.name, images)
            rows.append(Row.of(f"Triton over {protocol}", how, [digest]))
    nnpack = Row.of("PyTorch's NNPACK", what, run_eager(network, images, True, torch.float32))
    probed = np.concatenate([images, probe_images(images)])
    planted = find_planted(release.onnx, network, subject.images, probed)
    return {
        "exact_sha256": manifest["exact_sha256"],
        "images": len(images),
        "largest_sum": require_bounds(network, subject.images),
        "right": count_right(network, sample),
        "right_without_limit": count_right(wider, sample),
        "rows": [asdict(row) for row in rows],
        "nnpack": asdict(nnpack),
        "planted": planted,
    }


def require_one_digest(record: dict[str, Any]) -> None:
    """Raise CheckFailedError if a run has another digest, or a planted change was not found."""
    wanted = record["exact_sha256"]
    wrong = [row["runtime"] for row in record["rows"] if [*row["digests"]] != [wanted]]
    missed = [each["what"] for each in record["planted"] if each["found"] == "NOT found"]
    if wrong or missed:
        raise CheckFailedError(f"another digest: {wrong}; not found: {missed}")


def main(arguments: list[str]) -> None:
    """Measure the packaged exact model, write the result, and fail unless it has one digest."""
    given = make_result_parser(__doc__).parse_args(arguments)
    paths = Paths(name=f"{given.name}-exact")
    release = load_selected_releases(paths)[paths.name]
    record = {"command": "make prove-exact", **machine(), **measure(paths, release)}
    write_figure("exact", given.result, record)
    render_pages()
    require_one_digest(record)
    print(f"wrote {given.result}")


if __name__ == "__main__":
    run_tool(main)
