"""Run exported files on the ONNX Runtimes inside older Tritons, and compare with eager PyTorch.

Run by `make prove-runtimes`. Each ONNX Runtime has a separate environment, which is made once.
"""

import json
import subprocess
import tempfile
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.evaluate import Judgement, judge, predict
from pipeline.core.files import remove
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.export.export import export_program, signature_of, to_onnx
from pipeline.export.subject import Subject, load_sample, subject_of_run
from pipeline.export.targets import ExportConfig, onnx_dialect, span
from pipeline.training.networks import eager_predictor
from tools.edge import print_now, run_tool
from tools.provenance import write_figure
from tools.readme import render_pages

ENVIRONMENTS = Path(".venv-runtimes")
MAX_ABS_DIFF = 1e-4  # between log-probabilities
RUNNER = Path(__file__).parent / "run_onnx.py"


@dataclass(frozen=True)
class Runtime:
    """An ONNX Runtime to try, with a Triton release that holds it."""

    onnxruntime: str
    numpy: str  # each ONNX Runtime was built for numpy 1 or 2
    release: str

    @property
    def packages(self) -> list[str]:
        return [f"onnxruntime=={self.onnxruntime}", f"numpy=={self.numpy}"]


RUNTIMES = (
    Runtime("1.16.3", "1.26.4", "24.02"),
    Runtime("1.18.1", "1.26.4", "24.07"),
    Runtime("1.20.1", "2.2.6", "25.02"),
    Runtime("1.23.2", "2.2.6", "26.01"),
)


@dataclass(frozen=True)
class Row:
    """Result of one ONNX Runtime with one file."""

    onnxruntime: str  # the imported version, as for numpy
    numpy: str
    releases: str  # Triton releases with this ONNX Runtime
    file: str  # "default", or the release for which it was exported
    opset: int
    ir_version: int
    images: int
    differing: int  # images whose class differs from eager PyTorch's
    max_abs_diff: float  # of log-probabilities

    def __str__(self) -> str:
        return (
            f"ONNX Runtime {self.onnxruntime}, numpy {self.numpy}, opset {self.opset}, "
            f"IR {self.ir_version} ({self.file}): {self.differing} of {self.images:,} classes "
            f"differ, largest difference {self.max_abs_diff:.2e}"
        )

    @property
    def agrees(self) -> bool:
        """Whether the answers agree with eager PyTorch's; NaN never agrees."""
        return self.differing == 0 and self.max_abs_diff <= MAX_ABS_DIFF


def environment(runtime: Runtime) -> Path:
    """Return the Python of the runtime's environment, which is built if it does not exist.

    Raises PipelineError when the packages cannot be installed.
    """
    folder = ENVIRONMENTS / runtime.onnxruntime
    python, stamp = folder / "bin" / "python", folder / "done"
    wanted = " ".join(runtime.packages)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    remove(folder)
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    if subprocess.run([*pip, *runtime.packages], check=False).returncode:
        raise PipelineError(
            f"{wanted} cannot be installed, pip said why: the old ones have wheels for Python "
            "3.11 only, so build the project's environment with that (make PYTHON=python3.11)"
        )
    stamp.write_text(wanted)
    return python


def onnx_files(subject: Subject, dialects: set[ExportConfig]) -> dict[ExportConfig, bytes]:
    """Export the network as an ONNX file of each dialect."""
    program = export_program(subject.model, subject.images)
    return {config: to_onnx(program, signature_of(subject, config), {}) for config in dialects}


def run_file(python: Path, content: bytes, images: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
    """Run a file in another Python on images (N, ...); return (N, K), and the imported versions.

    The outputs are log-probabilities. Raises CheckFailedError when the file does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("model.onnx", "images.npy", "outputs.npy")]
        files[0].write_bytes(content)
        np.save(files[1], images)
        # Isolated (-I): nothing of this environment leaks into that one.
        command = [str(python), "-I", str(RUNNER), *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise CheckFailedError(f"{python} does not run the model: {last}")
        outputs: np.ndarray = np.load(files[2])
    return outputs, json.loads(done.stdout)


def prove(
    subject: Subject,
    images: np.ndarray,
    runtimes: tuple[Runtime, ...] = RUNTIMES,
    report: Callable[[str], object] = lambda line: None,
) -> list[Row]:
    """Run each runtime on images (N, 1, 28, 28) with two files; return a row for each.

    The files are the default one and the one exported for the runtime's Triton release.
    """
    reference = predict(eager_predictor(subject.model), images)
    newest = {runtime.release: onnx_dialect(runtime.release) for runtime in runtimes}
    contents = onnx_files(subject, {onnx_dialect(), *newest.values()})
    rows = []
    for runtime in runtimes:
        report(f"{' '.join(runtime.packages)}, as in Triton {runtime.release}")
        python = environment(runtime)
        for file, config in (
            ("default", onnx_dialect()),
            (runtime.release, newest[runtime.release]),
        ):
            outputs, imported = run_file(python, contents[config], images)
            judgement = judge(reference, outputs)
            rows.append(_row(runtime, file, config, imported, judgement))
            report(f"  {rows[-1]}")
    return rows


def _row(
    runtime: Runtime,
    file: str,
    config: ExportConfig,
    imported: dict[str, str],
    judgement: Judgement,
) -> Row:
    return Row(
        onnxruntime=imported["onnxruntime"],
        numpy=imported["numpy"],
        releases=span(runtime.release).releases,
        file=file,
        opset=config.opset,
        ir_version=config.ir_version,
        images=len(judgement.errors),
        differing=int(judgement.is_changed.sum()),
        max_abs_diff=float(judgement.errors.max()),
    )


def require(rows: list[Row]) -> None:
    """Raise CheckFailedError that lists the rows that do not agree, unless all agree."""
    wrong = [str(row) for row in rows if not row.agrees]
    if wrong:
        raise CheckFailedError(f"answers differ from eager PyTorch's: {'; '.join(wrong)}")


def main(result: Path, run: str = Paths.run) -> None:
    """Check a finished run on its test images, and keep the result if all runtimes agree."""
    paths = Paths(run=run)
    subject = subject_of_run(paths)
    training = subject.origin["training"]
    images = load_sample(paths, subject.origin).images
    rows = prove(subject, images, report=print_now)
    require(rows)
    record: dict[str, Any] = {
        "command": "make prove-runtimes",
        **machine(),
        "recipe": training["recipe"],
        "dataset": training["dataset"],
        "rows": [asdict(row) for row in rows],
    }
    write_figure("runtimes", result, record)
    render_pages()
    print(f"wrote {result}")


if __name__ == "__main__":
    run_tool(lambda arguments: main(Path(arguments[0]), *arguments[1:]))
