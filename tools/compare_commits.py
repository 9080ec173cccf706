"""Compare what two commits do: the bytes they export, the JSON of every stage, the command line.

    python tools/compare_commits.py BASE [HEAD]

Each commit is checked out into a temporary git worktree and runs the stages of
`make all RECIPE=quick SEED=7` and those after it, with the environments and the data of this
checkout. Values that differ from run to run (times, rates, dates, ports, process and commit ids)
are left out; their keys are not. Exits 0 when nothing differs and 3 when something does.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHOWN = 30  # differences of one section that are printed

MODELS = "exported/model_repository"
# The stages in order, each a command; URL stands for the server that `serve` started.
STAGES = (
    "data fetch",
    "data verify",
    "data sample digits --count 200",
    "train --recipe quick --seed 7",
    "export --precision fp32,fp16,int8",
    "export --list-targets",
    "validate",
    "package --explain",
    "package",
    "package --deploy kubernetes",
    f"lint {MODELS}",
    "versions list",
    f"validate {MODELS}",
    "report",
    "report --table",
    "serve --detach --port auto",
    "serve status",
    "query digits --url URL --prediction-log seen.jsonl",
    "drift seen.jsonl",
    "validate URL",
    "serve stop",
    "score digits --output scored",
    "doctor",
)
# Stages whose values depend on the machine and the time: only their keys are compared.
KEYS_ONLY = ("serve", "serve status", "serve stop", "doctor")
# Parts of a key whose values differ from run to run. The digests are of records with times in them.
CHANGING = re.compile(
    r"seconds|second$|_at$|^at$|^time$|date|pid$|commit|^url$|^id$|bytes$|\.log$|"
    r"validation\.json|MODEL_CARD\.md|source_digest|server|machine"
)
# Parts of a text that differ from run to run: dates, ports, addresses in memory.
CHANGING_TEXT = re.compile(r"\d{4}-\d\d-\d\dT[\d:.+Z-]+|(?<=127\.0\.0\.1:)\d+|0x[0-9a-f]{6,}")
EXACT = {".onnx", ".npz", ".pbtxt", ".safetensors", ".txt", ".png", ".pt2", ".parquet"}

# The behaviour of a commit in sections, each with values by their names.
Facts = dict[str, object]
Behaviour = dict[str, Facts]

# Works before and after `pipeline.cli` became a package.
PRINT_COMMANDS = """
import click, json
from pipeline.__main__ import main
print(json.dumps(main.to_info_dict(click.Context(main)), default=str))
"""


def main() -> int:
    """Run both commits, print what differs, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("base")
    parser.add_argument("head", nargs="?", default="HEAD")
    arguments = parser.parse_args()
    base, head = (behaviour(commit) for commit in (arguments.base, arguments.head))
    sections = {name: differences(base[name], head[name]) for name in base}
    for name, lines in sections.items():
        if lines:
            print(f"\n{name}: {len(lines)} differences")
            print("\n".join(f"  {line}" for line in lines[:SHOWN]))
    total = sum(map(len, sections.values()))
    compared = ", ".join(f"{len(base[name])} {name}" for name in base)
    print(f"{arguments.base} and {arguments.head}: {total} differences in {compared}")
    return 3 if total else 0


def behaviour(commit: str) -> Behaviour:
    """Return everything that is compared, for one commit."""
    with worktree(commit) as source, tempfile.TemporaryDirectory(prefix="chain-") as folder:
        root = Path(folder)
        for name in (".venv-triton", "data"):
            if (REPOSITORY / name).exists():
                (root / name).symlink_to((REPOSITORY / name).resolve())
        outputs = run_stages(source, root)
        files, records = read_files(root)
        options, texts = command_line(source)
    return {
        "files": files,
        "values in outputs": outputs,
        "values in records": records,
        "options": options,
        "help texts": texts,
    }


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder, which is removed afterwards."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    with tempfile.TemporaryDirectory(prefix="commit-") as folder:
        path = Path(folder) / "source"
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def python(source: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the project's Python with the package of a worktree in place of the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(REPOSITORY / ".venv/bin/python"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def run_stages(source: Path, root: Path) -> Facts:
    """Run every stage in `root`; return the values of the JSON that each prints."""
    facts: Facts = {}
    url = ""
    try:
        for stage in STAGES:
            arguments = [url if part == "URL" else part for part in stage.split()]
            done = python(source, "-m", "pipeline", "--json", *arguments, cwd=root)
            if done.returncode:
                print(f"'{stage}' exits {done.returncode}: {done.stderr[-500:]}", file=sys.stderr)
            facts[f"{stage}: exit"] = done.returncode
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            if stage.startswith("serve ") and "grpc_port" in lines[0]:
                url = f"grpc://127.0.0.1:{lines[0]['grpc_port']}"
            values = flatten(lines, stage, root)
            facts |= dict.fromkeys(values, "") if stage.startswith(KEYS_ONLY) else values
    finally:
        python(source, "-m", "pipeline", "serve", "stop", cwd=root)
    return facts


def read_files(root: Path) -> tuple[Facts, Facts]:
    """Return the digests of the files that the stages made, and the values of their JSON."""
    files: Facts = {}
    records: Facts = {}
    made = [path for path in root.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    for path in sorted(made):
        name = str(path.relative_to(root))
        files[name] = ""
        if path.suffix == ".json":
            records |= flatten(json.loads(path.read_text()), name, root)
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            records |= flatten(lines, name, root)
        elif path.suffix == ".yaml":  # names digests of records with times in them
            files[name] = re.sub(r"[0-9a-f]{12,}", "...", path.read_text())
        elif path.suffix in EXACT:
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files, records


def command_line(source: Path) -> tuple[Facts, Facts]:
    """Return every command with its options, their defaults and choices; and the help texts."""
    done = python(source, "-c", PRINT_COMMANDS, cwd=source)
    if done.returncode:
        raise SystemExit(done.stderr)
    options: Facts = {}
    texts: Facts = {}
    for name, value in flatten(json.loads(done.stdout), "pipeline", source).items():
        is_help = name.endswith((".help", ".short_help", ".epilog"))
        (texts if is_help else options)[name] = value
    return options, texts


def flatten(value: object, name: str, root: Path) -> Facts:
    """Return each value in nested lists and dictionaries under its path; "" if it changes."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    elif isinstance(value, str):
        return {name: CHANGING_TEXT.sub("...", value.replace(str(root), "ROOT"))}
    else:
        return {name: value}
    facts: Facts = {f"{name}.": len(items)} if isinstance(value, list) else {}
    for key, inner in items:
        values = flatten(inner, f"{name}.{key}", root)
        facts |= dict.fromkeys(values, "") if CHANGING.search(str(key)) else values
    return facts


def differences(base: Facts, head: Facts) -> list[str]:
    """Return a line for each name whose values differ or that only one side has."""
    lines = []
    for name in [*base, *(name for name in head if name not in base)]:
        if name not in head:
            lines.append(f"{name}: only in the base ({base[name]!r})")
        elif name not in base:
            lines.append(f"{name}: only in the head ({head[name]!r})")
        elif base[name] != head[name]:
            lines.append(f"{name}: {base[name]!r} -> {head[name]!r}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
