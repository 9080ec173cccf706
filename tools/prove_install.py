"""Install the wheel without extras in a new environment, and use it; run by `make prove-install`.

Also asks the package index for a wheel of each pinned version for Python 3.14.
"""

import json
import subprocess
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailedError
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.data.splits import load_split
from pipeline.images.read import write_png
from tools.edge import make_result_parser, print_now, run_tool
from tools.provenance import write_figure
from tools.readme import render_pages

CONSTRAINTS = Path("constraints.txt")
PYTHON = "3.14"
NOWHERE = "127.0.0.1:9"  # nothing listens at the port of 'discard'
INSTALL = "pip install 'handwriting-pipeline[train]'"
Python = list[str]  # the start of a command: an isolated Python


def pip(python: Python, *arguments: str) -> str:
    """Run pip of an environment; return its output, or raise CheckFailedError with its errors."""
    command = [*python, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise CheckFailedError(f"'pip {' '.join(arguments[:3])} ...' fails: {' '.join(last)}")
    return done.stdout


def use(python: Python, arguments: list[str], code: int, text: str = "") -> None:
    """Run a command of ours; raise CheckFailedError unless it exits with `code` and says `text`."""
    command = [*python, "-m", "pipeline", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != code or text not in done.stdout + done.stderr:
        raise CheckFailedError(
            f"'pipeline {' '.join(arguments)}' exits with {done.returncode}, not {code} and "
            f"{text!r}: {done.stdout[-300:]}{done.stderr[-600:]}"
        )


def try_light(python: Python, paths: Paths, picture: Path) -> None:
    """Use what comes without extras, then `query --onnx` with ONNX Runtime, then miss torch."""
    root, remote = ["--root", str(paths.root)], f"http://{NOWHERE}"
    use(python, ["--version", "-v"], 0, "tritonclient ")
    use(python, ["doctor"], 0, INSTALL)
    use(python, [*root, "lint"], 0, "0 errors")
    use(python, ["query", "--url", remote, str(picture)], 5)
    use(python, [*root, "validate", remote], 5)
    use(python, ["train"], 1, INSTALL)
    use(python, [*root, "query", "--onnx", str(picture)], 1, "pip install onnxruntime")
    pip(python, "install", "-q", "-c", str(CONSTRAINTS), "onnxruntime")
    use(python, [*root, "query", "--onnx", str(picture)], 0, f"{picture}: 7")


def find_wheels(python: Python) -> list[str]:
    """Return the files that pip would install of the pinned set on Python 3.14; it installs none.

    Raises CheckFailedError where a version has no wheel. torch is left out: only its metadata is
    asked for, since its wheel is large.
    """
    pins = [line for line in CONSTRAINTS.read_text("utf-8").splitlines() if "==" in line]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        target = ["--target", folder, "--python-version", PYTHON, "--only-binary=:all:"]
        options = ["--dry-run", "-q", "--no-deps", "--ignore-installed", *target]
        wanted = [pin for pin in pins if not pin.startswith("torch==")]
        pip(python, "install", *options, "--report", str(report), *wanted)
        installed = json.loads(report.read_text("utf-8"))["install"]
    return [str(item["download_info"]["url"]).rsplit("/", 1)[-1] for item in installed]


def measure(python: Python) -> dict[str, Any]:
    """Return what is installed: its bytes, packages, and the seconds to import the client."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([*python, "-c", code], capture_output=True, text=True, check=True)
    files = [path for path in Path(done.stdout.strip()).rglob("*") if path.is_file()]
    listed = json.loads(pip(python, "list", "--format", "json"))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([*python, "-c", "import pipeline.client.client"], check=True)
        times.append(time.perf_counter() - start)
    return {
        "bytes": sum(path.stat().st_size for path in files),
        "packages": sorted(item["name"] for item in listed if item["name"] != "pip"),
        "import_seconds": min(times),
    }


def main(arguments: list[str]) -> None:
    """Install, measure, use; keep the result if all commands do what they should."""
    parser = make_result_parser(__doc__)
    parser.add_argument("wheel", type=Path)
    given = parser.parse_args(arguments)
    paths = Paths(Path().absolute(), name=given.name, run=given.name)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = [str(Path(folder) / "bin" / "python"), "-I"]
        print_now(f"installing {given.wheel.name} without extras")
        pip(python, "install", "-q", "-c", str(CONSTRAINTS), str(given.wheel.absolute()))
        installed = measure(python)
        if heavy := {"torch", "onnxruntime", "onnxruntime-gpu"} & {*installed["packages"]}:
            raise CheckFailedError(f"an installation without extras brings {', '.join(heavy)}")
        picture = Path(folder) / "seven.png"
        write_png(255 - load_split("mnist", paths.data("mnist"), "test").images[0], picture)
        try_light(python, paths, picture)
        print_now(f"looking for wheels for Python {PYTHON}")
        wheels = find_wheels(python)
    record = {"command": "make prove-install", **machine(), **installed}
    write_figure("install", given.result, {**record, "python": PYTHON, "wheels": len(wheels)})
    render_pages()


if __name__ == "__main__":
    run_tool(main)
