"""Mutate a model repository in every known way, and compare lint with a real Triton.

    python -m tools.prove_lint tools/results/lint.json

Then compare it with ONNX Runtime itself, on the models of ONNX's own tests. Exits with 1 if lint
(static and live together) misses what Triton refuses, or refuses what loads and is correct.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx.backend.test.case.node import collect_testcases

from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.repository.lint.check import lint_model
from pipeline.repository.lint.text import Finding
from pipeline.serving.scratch import LiveTrial, try_models
from tools.mutations import CASES, LOADS, ON_A_SERVER, UNTRIED, Case, build, static_fault
from tools.provenance import write_figure
from tools.readme import render_pages

COMMAND = "make prove-lint"
RUNTIME_TYPES = {
    **{f"int{bits}": f"TYPE_INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"TYPE_UINT{bits}" for bits in (8, 16, 32, 64)},
    "float": "TYPE_FP32",
    "double": "TYPE_FP64",
    "float16": "TYPE_FP16",
    "bool": "TYPE_BOOL",
    "bfloat16": "TYPE_BF16",
    "string": "TYPE_STRING",
}


def row(case: Case, findings: list[Finding], trial: LiveTrial, repository: Path) -> dict[str, Any]:
    """Return one row of the table; its fault is empty if lint and the server are as expected."""
    errors = [f for f in findings if f.level == "error"]
    told = [f for f in findings if f.rule == case.rule] or errors or findings
    fault = static_fault(case, findings)
    if trial.outcome not in ON_A_SERVER[case.expected]:
        fault += f" the server: {trial.outcome}"
    cause = trial.cause or (told[0].message if told else "")
    return {
        "case": case.name,
        "expected": case.expected,
        "why": case.why,
        "static": ("error: " if errors else "warning: ") + told[0].rule if told else "nothing",
        "line": told[0].line if told else None,
        "live": trial.outcome,
        "cause": cause.replace(f"{repository}/", "")[:300],
        "source": case.source or (told[0].source if told else None) or trial.source,
        "fault": fault,
    }


def table() -> list[dict[str, Any]]:
    """Run all cases in a temporary repository; return the rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        build(repository)
        static = {case.name: list(lint_model(repository / case.name)) for case in CASES}
        trials = try_models(repository, [case.name for case in CASES], Paths())
        return [
            row(case, static[case.name], trial, repository)
            for case, trial in zip(CASES, trials, strict=True)
        ]


def corpus() -> dict[str, int]:
    """Count what lint and ONNX Runtime accept and refuse of the models of ONNX's own tests."""
    onnxruntime.set_default_logger_severity(4)
    counts = {"sound": 0, "refused_though_sound": 0, "not_servable": 0, "and_by_lint": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the reference implementations in some tests
        models = [case.model for case in collect_testcases(None) if case.model]
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(models):
            place = Path(folder) / str(number)
            (place / "1").mkdir(parents=True)
            onnx.save(model, place / "1" / "model.onnx")
            described = describe(model, place)
            refused = any(finding.level == "error" for finding in lint_model(place))
            counts["sound" if described else "not_servable"] += 1
            if refused:
                counts["refused_though_sound" if described else "and_by_lint"] += 1
    return counts


def describe(model: onnx.ModelProto, place: Path) -> bool:
    """Write the config for a model as ONNX Runtime sees it; return False if that is impossible.

    It is impossible if ONNX Runtime does not load the model, or if Triton has no type for a tensor:
    a sequence, a map, an empty tensor.
    """
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    except Exception:  # any error: Triton would get it as well
        return False
    names = {f"tensor({onnx_name})": name for onnx_name, name in RUNTIME_TYPES.items()}
    text = 'backend: "onnxruntime"\n'
    for kind, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for node in nodes:
            dims = [dim if isinstance(dim, int) else -1 for dim in node.shape] or [1]
            if node.type not in names or 0 in dims:
                return False
            text += f'{kind} {{ name: "{node.name}" data_type: {names[node.type]} dims: {dims} }}\n'
    (place / "config.pbtxt").write_text(text)
    return True


def main() -> None:
    """Check every case with lint and a server, and keep the table."""
    os.umask(0o022)
    rows = table()
    for row in rows:
        mark = "WRONG" if row["fault"] else "right"
        print(
            f"{mark}  {row['case']:36} {row['expected']:16} {row['static']:24} "
            f"{row['live']:11} {row['fault'] or row['cause']}"
        )
    right = {LOADS, UNTRIED}
    record: dict[str, Any] = {
        "command": COMMAND,
        "mutations": sum(row["expected"] not in right for row in rows),
        "sound": sum(row["expected"] in right for row in rows),
        "faults": sum(bool(row["fault"]) for row in rows),
        "corpus": corpus(),
        "cases": rows,
    }
    record["faults"] += record["corpus"]["refused_though_sound"]
    write_figure("lint", Path(sys.argv[1]), {**machine(), **record})
    render_pages()
    print(f"{record['mutations']} mutations, {record['sound']} sound variations, ", end="")
    print(f"{record['faults']} not as expected; ONNX's own tests: {record['corpus']}")
    sys.exit(1 if record["faults"] else 0)


if __name__ == "__main__":
    main()
