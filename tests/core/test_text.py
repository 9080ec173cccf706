"""What comes from files, folders and servers, as a terminal gets to see it."""

import ast
import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto

from pipeline.cli.main import main
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.core.signature import IMAGES, log_probabilities
from pipeline.core.text import Lines, escape
from pipeline.repository import config_pbtxt
from pipeline.repository.running import Server, start_time
from pipeline.repository.settings import PackageConfig
from tests.cli.test_main import commands
from tests.client.test_query import stroke
from tests.conftest import REPOSITORY, Chain, edit_json, small
from tests.fakes import Asked, Reply, as_triton, http_server
from tools.mutations import external, write_model

FORGED = "handwriting: 0 errors, 0 warnings, not tried on a server"
# A terminal is cleared, the bell rings, the line is written over and turned around; and a line.
HOSTILE = f"x\x1b[2J\x07\x7f\r\x9b\u202e\u2028\n{FORGED}"
HOSTILE_FILE = f"{HOSTILE}\udcff"  # a byte of a name that is not text
# These print nothing of the project's folder, need more than it, or have a case of their own.
NOT_IN_IT = {
    *((), ("data",), ("data", "fetch"), ("runs",), ("versions",), ("web",), ("score",)),
    *(("serve", name) for name in ("status", "logs", "restart", "stop")),
}
PACKAGE = REPOSITORY / "pipeline"
# Where a string may have a line break: it is of a file or of a request, or is looked for in one.
WITH_LINE_BREAKS = {
    "export/graph",  # a pattern
    "repository/lint/formats",  # what is escaped
    *(
        "core/text",
        "cli/main",
        "core/files",
        "training/records",
        "client/log",
        "repository/reference_profile",
        "scoring/source",
    ),
    *("export/subject", "repository/package", "benchmark/table"),
    *(
        "benchmark/load_http",
        "serving/scratch",
        "repository/lint/text",
        "repository/ort_values",
        "doctor/packages",
        "doctor/checks",
        "scoring/job",
    ),
    "serving/state",
}


def test_a_line_break_is_only_what_lines_were_put_together_with() -> None:
    assert escape("größe 7\u00d73 日本") == "größe 7\u00d73 日本"
    assert escape("a\nb\tc\x1b\x7f\udcff") == r"a\nb\tc\x1b\x7f\udcff"
    rows = Lines("title", Lines("a", "b\nc"), 5)
    assert str(rows) == escape(rows) == escape(PipelineError(rows)) == "title\na\nb\\nc\n5"
    assert escape(f"{rows}!") == r"title\na\nb\nc\n5!"
    for lines in (rows, Lines(), Lines("a")):
        assert escape(copy.deepcopy(lines)) == escape(pickle.loads(pickle.dumps(lines))) == lines


def strings(tree: ast.AST) -> list[str]:
    """Every string in a module but its docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [c.value for c in constants if isinstance(c.value, str) and id(c) not in docstrings]


def test_commands_print_with_one_function_and_put_lines_together_with_lines() -> None:
    printing = {"click.echo", "click.secho", "print", "sys.stdout.write", "sys.stderr.write"}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name.startswith(("serving/backend/", "serving/templates/")):
            continue  # they run elsewhere
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert (
            name in ("cli/command", "doctor/probes", "export/first_run") or not calls & printing
        ), path
        broken = [string for string in strings(tree) if "\n" in string]
        assert name in WITH_LINE_BREAKS or not broken, f"{path}: use Lines for {broken}"


class Stage:
    """A folder where a case prepares what is foreign; the chain where it needs one."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.root: Path = request.getfixturevalue("tmp_path")
        self._request = request

    @property
    def chain(self) -> Chain:
        chain: Chain = self._request.getfixturevalue("chain")
        return chain

    def serve(self, reply: Callable[[str, Asked], Reply | None]) -> str:
        """The URL of a server that answers so until the test is over."""
        server = http_server(reply)
        port, _ = server.__enter__()
        self._request.addfinalizer(lambda: server.__exit__(None, None, None))
        return f"http://127.0.0.1:{port}"


Case = Callable[[Stage], list[str]]


def folder_of_a_model(stage: Stage) -> list[str]:
    write_model(stage.root / "models" / HOSTILE)
    return ["lint", str(stage.root / "models")]


def location_of_external_data(stage: Stage) -> list[str]:
    write_model(stage.root / "models" / "net")
    external(stage.root / "models" / "net", HOSTILE, 0)
    return ["lint", str(stage.root / "models")]


def hostile_model(stage: Stage) -> Path:
    weight = TensorProto(name=HOSTILE, data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=HOSTILE)
    file = stage.root / "model.onnx"
    file.write_bytes(small(tensors=[weight]).SerializeToString())
    return file


def tensor_and_location(stage: Stage) -> list[str]:
    file = str(hostile_model(stage))
    return ["validate", "--onnx", file, "--module", "a:b", "--images", file]


def tensor_in_a_file_that_is_scrubbed(stage: Stage) -> list[str]:
    file = str(hostile_model(stage))
    return ["validate", "--onnx", file, "--scrub", "--module", "a:b", "--images", file]


def input_of_a_graph(stage: Stage) -> list[str]:
    write_model(stage.root / "models" / "net")
    file = stage.root / "models" / "net" / "1" / "model.onnx"
    model = onnx.load(file)
    model.graph.input[0].name = model.graph.node[0].input[0] = HOSTILE
    file.write_bytes(model.SerializeToString())
    return ["lint", str(stage.root / "models")]


def value_in_a_config(stage: Stage) -> list[str]:
    write_model(stage.root / "models" / "net")
    file = stage.root / "models" / "net" / "config.pbtxt"
    file.write_text(file.read_text().replace('"onnxruntime"', json.dumps(HOSTILE)))
    return ["lint", str(stage.root / "models")]


def file_that_is_no_picture(stage: Stage) -> list[str]:
    (stage.root / HOSTILE_FILE).write_text("no picture")
    return ["query", str(stage.root)]


def file_that_is_answered(stage: Stage) -> list[str]:
    stroke(stage.root / f"{HOSTILE_FILE}.png")
    return ["query", str(stage.root), "--url", stage.serve(as_triton)]


def error_of_a_server(stage: Stage) -> list[str]:
    said = json.dumps({"error": HOSTILE.replace("\n", " \x85")}).encode()
    url = stage.serve(lambda method, asked: Reply(400, said))
    return ["query", str(stroke(stage.root / "0.png")), "--url", url]


def label_of_a_server(stage: Stage) -> list[str]:
    labels = [f"{digit}{HOSTILE}" for digit in range(10)]
    settings = PackageConfig()
    config = config_pbtxt.base_config(
        "handwriting", IMAGES, log_probabilities(10), labels, settings
    )
    answer = Reply(body=config_pbtxt.to_json(config).encode())
    url = stage.serve(lambda method, asked: answer if method == "ModelConfig" else None)
    return ["query", str(stroke(stage.root / "0.png")), "--url", url]


def server_that_is_proven(stage: Stage) -> list[str]:
    said = json.dumps({"error": HOSTILE, "name": HOSTILE, "version": HOSTILE}).encode()
    url = stage.serve(lambda method, asked: Reply(400, said))
    return ["validate", url, "--golden", str(stage.chain.paths.golden)]


def class_of_a_data_set(stage: Stage) -> list[str]:
    for name in (HOSTILE_FILE, "b"):
        (stage.root / "set" / name / "folder").mkdir(parents=True)
    return ["--root", str(stage.root), "data", "fetch", "--dataset", f"folder:{stage.root}/set"]


def file_left_out_of_a_data_set(stage: Stage) -> list[str]:
    (stage.root / "set").mkdir()
    (stage.root / "set" / HOSTILE_FILE).write_text("")
    return ["--root", str(stage.root), "data", "fetch", "--dataset", f"folder:{stage.root}/set"]


def precision_of_a_version(stage: Stage) -> list[str]:
    for manifest in stage.chain.paths.packaged.glob("*/manifest.json"):
        edit_json(manifest, lambda record: record.update(precision=HOSTILE))
    return ["--root", str(stage.chain.root), "versions", "list"]


def why_a_server_was_restarted(stage: Stage) -> list[str]:
    started = start_time(os.getpid()) or 0
    server = Server(
        *(
            "handwriting-0123456789ab",
            os.getpid(),
            started,
            os.getpid(),
            started,
            1,
            2,
            3,
            "key",
            "wheel",
            "",
            {},
        ),
        *(False, 0.0, 1, HOSTILE, str(stage.root.resolve())),
    )
    paths = Paths(stage.root)
    paths.server.parent.mkdir(parents=True)
    paths.server.write_text(json.dumps({"schema": 1, **asdict(server)}))
    paths.server.chmod(0o600)
    return ["--root", str(stage.root), "serve", "status"]


def log_of_a_server(stage: Stage) -> list[str]:
    log = Paths(stage.root).server_log
    log.parent.mkdir(parents=True)
    log.write_text(" ".join(HOSTILE.splitlines()))  # its lines are lines
    return ["--root", str(stage.root), "serve", "logs"]


def row_of_an_agreement(stage: Stage) -> list[str]:
    record = json.loads((REPOSITORY / "tools" / "results" / "agreement.json").read_text())
    record["rows"][0]["name"] = HOSTILE
    paths = Paths(stage.root)
    paths.agreement.parent.mkdir(parents=True)
    paths.agreement.write_text(json.dumps(record))
    return ["--root", str(stage.root), "report", "--table"]


def version_in_a_prediction_log(stage: Stage) -> list[str]:
    line = {"time": HOSTILE, "version": HOSTILE, "class": HOSTILE}
    (stage.root / HOSTILE_FILE).write_text(json.dumps(line) + "\n")
    return ["--root", str(stage.chain.root), "drift", str(stage.root / HOSTILE_FILE)]


def source_of_what_is_scored(stage: Stage) -> list[str]:
    root = str(stage.chain.root)
    return ["--root", root, "score", str(stage.root / HOSTILE_FILE), "--output", "scored"]


def option_that_there_is_not(stage: Stage) -> list[str]:
    return ["lint", f"--{HOSTILE}"]


def file_of_settings(stage: Stage) -> list[str]:
    return ["--config", str(stage.root / HOSTILE_FILE), "data", "path"]


def traceback_of_an_error(stage: Stage) -> list[str]:
    return ["--debug", "data", "fetch", "--dataset", f"folder:{stage.root}/{HOSTILE}/a"]


def folder_of_the_project(*path: str) -> Case:
    """A command in a folder of that name where nothing is, and as what it asks for."""

    def of_command(stage: Stage) -> list[str]:
        found: click.Command = main
        for name in path:
            assert isinstance(found, click.Group)
            found = found.commands[name]
        asked = [p for p in found.params if p.required and isinstance(p, click.Argument)]
        numbers = [isinstance(p.type, click.IntRange) for p in asked]
        root = str(stage.root / HOSTILE_FILE)
        return ["--root", root, *path, *("1" if number else root for number in numbers)]

    of_command.__name__ = f"folder_of_the_project, {' '.join(path)}"
    return of_command


CASES: list[Case] = [
    *(folder_of_a_model, location_of_external_data, tensor_and_location, input_of_a_graph),
    *(tensor_in_a_file_that_is_scrubbed, value_in_a_config, file_that_is_no_picture),
    *(file_that_is_answered, error_of_a_server, label_of_a_server, server_that_is_proven),
    *(class_of_a_data_set, file_left_out_of_a_data_set, precision_of_a_version),
    *(why_a_server_was_restarted, log_of_a_server, row_of_an_agreement),
    *(version_in_a_prediction_log, source_of_what_is_scored, option_that_there_is_not),
    *(file_of_settings, traceback_of_an_error),
    *(folder_of_the_project(*path) for path in commands() if path not in NOT_IN_IT),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_foreign_text_is_printed_as_one_printable_line(
    case: Case, request: pytest.FixtureRequest
) -> None:
    result = CliRunner().invoke(main, case(Stage(request)), color=True)
    assert not [c for c in result.output if not (c.isprintable() or c == "\n")]
    assert FORGED in result.output
    assert not [line for line in result.output.split("\n") if line.startswith(FORGED)]


def test_an_image_has_one_line_of_json_whatever_its_file_is_called(tmp_path: Path) -> None:
    for index in range(3):
        stroke(tmp_path / f"{index}{HOSTILE_FILE}.png")
    with http_server(as_triton) as (port, _):
        url = f"http://127.0.0.1:{port}"
        result = CliRunner().invoke(main, ["--json", "query", str(tmp_path), "--url", url])
    assert all(line.isprintable() for line in result.stdout.split("\n"))
    files = [json.loads(line)["file"] for line in result.stdout.splitlines()]
    assert files == [str(tmp_path / f"{index}{HOSTILE_FILE}.png") for index in range(3)]
