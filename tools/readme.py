"""Keep what commands measured as results, and render the README's blocks from the results.

python -m tools.readme                               render the README
python -m tools.readme agreement AGREEMENT SUMMARY   keep a proof and the run's summary, then render
python -m tools.readme serving RECORD                keep what `benchmark --what serve` wrote
python -m tools.readme training RECORD               keep what `benchmark --what train` printed
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.files import read_json, write_bytes
from pipeline.core.machine import machine
from tools import proofs
from tools.edge import run_tool
from tools.provenance import MEASURE, read_figure, recipe_digest, write_figure

README = Path("README.md")
RESULTS = Path("tools/results")
_BLOCK = re.compile(r"(<!-- figures:(\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def keep_result(name: str, file: Path, command: str, record: Mapping[str, Any]) -> None:
    """Write a measured result with the command that measures it, and render the README."""
    write_figure(name, file, {**record, "command": command})
    render_readme()
    print(f"wrote {file}")


def agreement_figure(agreement: Path, summary: Path) -> dict[str, Any]:
    """Read how a model's runtimes agreed, and what is quoted of the summary of its run."""
    proof, training = read_json(agreement, MEASURE), read_json(summary, MEASURE)
    keys = ("recipe", "parameters", "test_accuracy", "train_seconds", "device")
    return {**proof, "training": {key: training[key] for key in keys}}


def training_figure(rows: Sequence[dict[str, Any]], figure: Path) -> dict[str, Any]:
    """Put measured rows among those of a figure, whose rows of other recipes stay as they were."""
    measured = {
        row["recipe"]: {**row, **machine(), "sources_sha256": recipe_digest(row["recipe"])}
        for row in rows
    }
    if figure.exists():
        measured = {row["recipe"]: row for row in read_figure(figure)["rows"]} | measured
    return {"rows": sorted(measured.values(), key=lambda row: float(row["share"]))}


def main(arguments: list[str]) -> None:
    """Keep a result, where there is one, and render the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind")
    for kind, files in (
        ("agreement", ["agreement", "summary"]),
        ("serving", ["record"]),
        ("training", ["record"]),
    ):
        of_kind = kinds.add_parser(kind)
        for file in files:
            of_kind.add_argument(file, type=Path)
    given = parser.parse_args(arguments)
    figure = RESULTS / f"{given.kind}.json"
    if given.kind == "agreement":
        record = agreement_figure(given.agreement, given.summary)
        keep_result("agreement", figure, "make figures", record)
    elif given.kind == "serving":
        record = read_json(given.record, MEASURE)
        keep_result("serving", figure, f"make prove-serving NAME={record['name']}", record)
    elif given.kind == "training":
        record = training_figure(json.loads(given.record.read_text())["rows"], figure)
        keep_result("training", figure, "make prove-training", record)
    else:
        render_readme()


def training_markdown(figure: dict[str, Any]) -> str:
    """The README's table of recipes."""
    lines = [
        "| recipe | parameters | multiply-adds | test accuracy, mean (95 % interval) | deviation "
        "| seeds | time against `baseline`'s 14 epochs | measured |",
        "|--|--|--|--|--|--|--|--|",
    ]
    rows = {row["recipe"]: row for row in figure["rows"]}
    for row in rows.values():
        share = row["share"]
        lines.append(
            f"| `{row['recipe']}` | {row['parameters']:,} | {row['multiply_adds']:,} | "
            f"{row['accuracy']:.3%} ± {row['half_width']:.3%} | {row['deviation']:.3%} | "
            f"{len(row['trials'])} | {f'1/{1 / share:,.0f}' if share < 0.5 else f'{share:.2f}'} | "
            f"{row['measured_at'][:10]} |"
        )
    host = figure["rows"][0]["machine"]
    beside = ""
    if {"quick", "record"} <= rows.keys():
        ratio = rows["quick"]["share"] / rows["record"]["share"]
        beside = (
            f" Side by side, `quick` takes {ratio:.2f} of the time of `record`, the published "
            "recipe of the 0.76-second record, in the same loop."
        )
    lines += [
        "",
        f"Measured by `{figure['command']}` (`best`: `make prove-best`), {host['processor']} with "
        f"{host['cores']} cores. The yardstick's 14 epochs are extrapolated from an eighth of an "
        f"epoch before and after each run.{beside}",
    ]
    return "\n".join(lines)


def agreement_markdown(figure: dict[str, Any]) -> str:
    """The README's table of agreement."""
    lines = [
        "| runtime | test accuracy | classes that differ | largest difference | images/s |",
        "|--|--|--|--|--|",
    ]
    for row in figure["rows"]:
        lines.append(
            f"| {row['name']} | {row['accuracy']:.2%} | {row['differing']} of "
            f"{figure['images']:,} | {row['max_abs_diff']:.1e} | {row['images_per_second']:,.0f} |"
        )
    training, host = figure["training"], figure["machine"]
    lines += [
        "",
        f"Recipe `{training['recipe']}`: {training['parameters']:,} parameters, trained in "
        f"{training['train_seconds']:.1f} s. Measured by `{figure['command']}` on "
        f"{figure['measured_at'][:10]}, {host['processor']} with {host['cores']} cores, "
        f"{host['system']}; server and client share them. Images/s: batches of 64, one after "
        "the other.",
    ]
    return "\n".join(lines)


def gpu_markdown(figure: dict[str, Any]) -> str:
    """The README's line about GPUs, once somebody has run the check."""
    return (
        f"GPU: verified by {figure['signed_off_by']} on {figure['measured_at'][:10]} with "
        f"`{figure['command']}`: {figure['device']}, torch {figure['torch']}, CUDA "
        f"{figure['cuda']}; {figure['tests']} tests; recipe `quick` reads "
        f"{figure['test_accuracy']:.2%} after {figure['train_seconds']:.1f} s of training "
        f"(through `torch.compile` {figure['compiled_train_seconds']:.1f} s)."
    )


def native_markdown(figures: Path) -> str:
    """The README's sentence about Triton's native backend, which stands behind that about GPUs."""
    file = figures / "native.json"
    figure = read_figure(file) if file.exists() else {}
    if figure.get("passed") is not True or figure.get("runtime") not in ("docker", "path"):
        return NATIVE_NOT_VERIFIED
    servers = figure["servers"]
    rounds = [found for served in servers for found in served["rounds"]]
    answers = sum(found["images"] for found in rounds)
    names = {"http": "HTTP", "grpc": "gRPC"}
    return (
        f"Triton's native backend: verified on {figure['measured_at'][:10]} with "
        f"`{figure['command']}` ({figure['runs_on']}; Triton {servers[0]['server']['version']}): "
        f"{answers:,} answers about {figure['golden']['images']} golden images over "
        f"{' and '.join(names[name] for name in figure['protocols'])}, one by one, in batches and "
        f"many at once; largest difference {max(found['max_abs_diff'] for found in rounds):.1e}, "
        f"{max(found['max_ratio'] for found in rounds):.0%} of what the proof allows at most."
    )


def resume_markdown(figure: dict[str, Any]) -> str:
    """The README's sentence about killed runs."""
    return (
        f"`{figure['command']}` on {figure['measured_at'][:10]}: {figure['kills']} times SIGKILL, "
        f"{figure['inside_a_write']} of them inside a write; {figure['loadable']} left a state to "
        f"go on from; {figure['identical_runs']} of {figure['runs']} killed and resumed runs "
        "ended with the same bytes as the one that was left alone."
    )


def runtimes_markdown(figure: dict[str, Any]) -> str:
    """The README's table of older ONNX Runtimes."""
    lines = [
        "| ONNX Runtime | in Triton | file | classes that differ | largest difference |",
        "|--|--|--|--|--|",
    ]
    for row in figure["rows"]:
        made_for = "the default" if row["file"] == "default" else f"for {row['file']}"
        lines.append(
            f"| {row['onnxruntime']} | {row['releases']} | opset {row['opset']}, IR "
            f"{row['ir_version']} ({made_for}) | {row['differing']} of {row['images']:,} | "
            f"{row['max_abs_diff']:.1e} |"
        )
    host = figure["machine"]
    lines += [
        "",
        f"Held against eager PyTorch by `{figure['command']}` on {figure['measured_at'][:10]}, "
        f"{host['processor']} with {host['cores']} cores: each ONNX Runtime in an environment of "
        "its own, on the CPU, without Triton around it.",
    ]
    return "\n".join(lines)


NOT_VERIFIED = (
    "GPU: *not verified* (nobody has run `make gpu-check SIGNED='your name'` on one yet)."
)
NATIVE_NOT_VERIFIED = (
    "What NVIDIA's container loads: *same bytes; native backend not verified* (nobody has run "
    "`make prove-native` where Docker is yet)."
)
MISSING = {
    "gpu": NOT_VERIFIED,
    "resume": "*Not proven yet*: `make prove-resume`.",
    "runtimes": "*Not proven yet*: `make prove-runtimes`.",
    **proofs.MISSING,
}
RENDERERS = {
    "agreement": agreement_markdown,
    "training": training_markdown,
    "gpu": gpu_markdown,
    "resume": resume_markdown,
    "runtimes": runtimes_markdown,
    **proofs.RENDERERS,
}


def rendered(readme: str, figures: Path) -> str:
    """`readme` with every figures block rendered anew from its JSON."""

    def block(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in RENDERERS:
            raise PipelineError(f"the README asks for figures {name!r}, which nothing renders")
        figure = figures / f"{name}.json"
        if name in MISSING and not figure.exists():
            text = MISSING[name]
        else:
            text = RENDERERS[name](read_figure(figure))
        if name == "gpu":
            text = f"{text} {native_markdown(figures)}"
        return f"{match.group(1)}{text}\n{match.group(3)}"

    return _BLOCK.sub(block, readme)


def render_readme(readme: Path = README, figures: Path = RESULTS) -> bool:
    """Write the figures into `readme`; whether that changed it."""
    before = readme.read_text()
    after = rendered(before, figures)
    if after != before:
        write_bytes(readme, after.encode())
    return after != before


if __name__ == "__main__":
    run_tool(main)
