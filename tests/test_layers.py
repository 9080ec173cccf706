"""The shape of the code: who may import whom, and where each heavy library lives."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "pipeline"
# A module imports only modules above it.
ORDER = [
    *(
        "text",
        "errors",
        "signature",
        "package_settings",
        "serve_settings",
        "gateway_settings",
        "score_settings",
        "targets",
        "paths",
        "files",
        "machine",
        "usage",
        "ruled",
        "ink",
    ),
    *("fitting", "images", "datasets", "data", "recipes", "photo_light", "photos"),
    *("folders", "sources", "archives", "evaluate", "timing", "golden", "validate", "probes"),
    *("speed_table", "turns", "open_loop"),
    "diagnose",
    *("findings", "sample", "predictions", "device", "processes", "augment"),
    *("letters", "outliers", "model"),
    *("reference", "checkpoint", "train", "records", "runs", "subject", "sizes", "graph"),
    *("policy", "departures", "handed", "variants", "export", "runtime", "photo_table"),
    "first_run",
    *("reference_profile", "profiling"),
    *("card", "trial", "workers"),
    *("proof", "triton", "running", "profiles", "tarball", "package"),
    *("lint_text", "lint_graph", "lint_files", "lint_config", "lint_backend"),
    *("lint_accelerators", "lint_rules", "lint"),
    *("endpoint", "faults", "wire", "prediction", "prediction_log", "asking", "http_connection"),
    "grpc_channel",
    *(
        "client",
        "async_client",
        "inputs",
        "query",
        "load_http",
        "load",
        "load_open",
        "release",
        "ready",
        "agreement",
    ),
    "yardstick",
    *("rounds", "verify", "versions", "tritonserver", "deploy", "admin", "candidate", "metrics"),
    *("server_process", "serve"),
    *("parquet", "shards", "scored", "cluster", "scorer", "score"),
    *("comparison", "infer", "beside", "served_score", "measure"),
    *("watch", "state", "supervise", "swap"),
    *("logged", "significance", "drift"),
    *("lint_ask", "lint_live", "limits", "counters", "guard", "link", "gateway"),
    *("connections", "webserver"),
    *("prove", "provenance", "gpu", "benchmark", "nondigits", "unsure"),
    *(
        "proofs",
        "report",
        "figures",
        "speed_figures",
        "speeds",
        "answers",
        "evidence",
    ),
    *("watched", "page"),
    *("installed", "doctor_probes", "doctor"),
    *("command", "cli_data", "cli_doctor", "cli_train", "cli_export", "cli_drift", "cli_validate"),
    *("cli_serve", "cli_query", "cli_score", "cli_versions", "cli_repository", "cli_measure"),
    *("cli_benchmark", "cli_web", "cli", "__main__"),
]
# The home of each heavy library.
HOMES = {
    "torch": {
        *("device", "processes", "augment", "model", "checkpoint", "train", "runs", "export"),
        *(
            "records",
            "gpu",
            "benchmark",
            "reference",
            "subject",
            "doctor_probes",
            "workers",
            "outliers",
        ),
    },
    "safetensors": {"checkpoint"},
    "onnx": {
        *("sizes", "graph", "policy", "departures", "variants", "export", "lint_graph", "doctor"),
    },
    "onnxruntime": {"export", "runtime", "variants", "doctor_probes", "first_run"},
    "tritonclient": {
        *("triton", "wire", "admin", "load_http", "load", "lint_config", "lint_backend"),
    },
    "google": {
        *("graph", "triton", "wire", "asking", "client", "async_client", "admin", "load"),
        *("lint_text", "lint_graph"),
    },
    "grpc": {"grpc_channel", "client", "async_client", "load", "load_open"},
    "aiohttp": {"async_client"},
    "prometheus_client": {"metrics", "counters"},
    "PIL": {"images", "limits", "photos", "photo_light", "nondigits"},
    "starlette": {"guard", "gateway"},
    "uvicorn": {"connections", "webserver"},
    "matplotlib": {"figures", "speed_figures"},
    "jinja2": {"page", "card", "deploy"},
    "pooch": {"sources"},
    "ray": {"cluster", "score"},
    "pyarrow": {"parquet", "scored"},
    "tensorboard": set(),  # through torch, where it is installed
    "click": {p.stem for p in PACKAGE.glob("cli*.py")} | {"command"},
}


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_every_module_has_its_place_in_the_order() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_above_it(module: str) -> None:
    ours = {name.split(".")[1] for name in imports(module) if name.startswith("pipeline.")}
    below = ours & set(ORDER[ORDER.index(module) :])
    assert not below, f"{module} imports {below}"


@pytest.mark.parametrize("module", ORDER)
def test_a_heavy_library_is_imported_in_its_home_only(module: str) -> None:
    for name in {name.split(".")[0] for name in imports(module)} & HOMES.keys():
        assert module in HOMES[name], f"{module} imports {name}"


def test_the_backend_imports_nothing_of_ours() -> None:
    for path in (PACKAGE / "backend").rglob("*.py"):
        assert "pipeline" not in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)


def tracked() -> list[Path]:
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    names = done.stdout.decode().split("\0")
    return [path for name in names if name and (path := REPOSITORY / name).is_file()]


def test_nothing_names_a_path_of_one_machine_or_the_host_of_a_package_registry() -> None:
    hosts = ("pypi" + ".org", "python" + "hosted", "npm" + "js", "deb." + "debian")
    folders = ("/" + "root/", "/" + "work/", "/" + "home/")
    for path in tracked():
        text = path.read_text(errors="ignore")
        for name in (*hosts, *folders):
            assert name not in text, f"{path} names {name}"
