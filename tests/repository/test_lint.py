import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.export.targets import target
from pipeline.repository.lint.check import lint_model, lint_repository
from pipeline.repository.lint.text import Config, Finding, find_field_lines, read_config
from pipeline.serving.scratch import LiveTrial, try_models
from pipeline.serving.tritonserver import find_cause
from tests.conftest import REPOSITORY, Chain, error_line
from tools.mutations import (
    CASES,
    ON_A_SERVER,
    Case,
    accelerated,
    bare,
    build,
    edit,
    external,
    graph,
    save,
    set_parameter,
    static_fault,
    write_model,
)

# Of each kind one, and what a server tells in its own way; `make prove-lint` tries them all.
TRIED = (
    *("misspelt_field", "name_of_another", "version_that_is_not_there"),
    *("file_cut_off", "labels_missing", "unknown_tensorrt_parameter", "memory_for_one_image"),
    *("rows_of_a_batch_added_up", "scalar_output", "no_config_at_all", "types_that_do_not_meet"),
    "version_beyond_all_numbers",
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one small model that is right."""
    write_model(tmp_path / "repository" / "net")
    return tmp_path / "repository"


def errors(repository: Path, release: str | None = None) -> list[str]:
    linted = lint_repository(repository, target(release) if release else None)
    return [str(finding) for finding in linted.findings if finding.level == "error"]


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutated") / "repository"
    build(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lint_says_of_each_case_what_triton_would(case: Case, mutated: Path) -> None:
    assert static_fault(case, list(lint_model(mutated / case.name))) == ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_finding_has_a_place_and_each_error_a_fix(case: Case, mutated: Path) -> None:
    for finding in lint_model(mutated / case.name):
        assert finding.file.is_relative_to(mutated)
        if finding.level == "error":
            assert finding.fix, finding
        if finding.line:
            assert finding.line <= len(finding.file.read_bytes().split(b"\n"))


@pytest.mark.server
def test_a_server_makes_of_each_case_what_is_expected(tmp_path: Path) -> None:
    cases = [case for case in CASES if case.name in TRIED]
    assert len(cases) == len(TRIED)
    build(tmp_path / "repository", cases)
    odd = "gr\u00f6\u00dfe #1?"  # a folder may be called so
    write_model(tmp_path / "repository" / odd)
    before = sorted(tmp_path.rglob("*"))
    paths = Paths(REPOSITORY)
    *trials, trial = try_models(
        tmp_path / "repository", [*(case.name for case in cases), odd], paths
    )
    assert (trial.outcome, "rename it" in trial.cause) == ("not judged", True)
    for case, trial in zip(cases, trials, strict=True):
        assert trial.model == case.name
        assert trial.outcome in ON_A_SERVER[case.expected], trial
        assert len(trial.cause.splitlines()) == (trial.outcome != "loads"), trial
    causes = {trial.model: trial.cause for trial in trials}
    assert 'no field named "max_bach_size"' in causes["misspelt_field"]
    assert "unexpected directory name" in causes["name_of_another"]
    assert "shape {1,2,4}" in causes["memory_for_one_image"]
    assert "bound to different types" in causes["types_that_do_not_meet"]
    assert "crashes" in causes["version_beyond_all_numbers"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.server
def test_what_package_makes_is_clean_on_a_server_too(made: Chain) -> None:
    command = ["--root", str(REPOSITORY), "--json", "lint", str(made.paths.repository), "--live"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["findings"], record["live"]) == ([], True)
    assert record["models"] == ["handwriting"]


def test_what_a_server_refuses_exits_with_3_and_its_cause_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = (case for case in CASES if case.name == "types_that_do_not_meet")
    build(tmp_path, [case])
    cause = "input 'a' is bound to different types"
    trials = [LiveTrial(case.name, "refused", cause)]
    monkeypatch.setattr("pipeline.serving.scratch.try_models", lambda *_: trials)
    command = ["--root", str(REPOSITORY), "lint", str(tmp_path), "--live"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 3
    line = result.stdout.splitlines()[0]
    assert line.startswith(f"{tmp_path / case.name / 'config.pbtxt'}: error: does not load: ")
    assert line.endswith(cause)


def test_a_clean_repository_exits_with_0_and_says_what_to_type_next(repository: Path) -> None:
    result = CliRunner().invoke(main, ["lint", str(repository)])
    assert result.exit_code == 0
    said = "net: 0 errors, 0 warnings, not tried on a server"
    assert result.stdout == f"{said}\nnext: pipeline lint {repository} --live\n"


def test_what_to_type_next_can_be_typed_whatever_the_folder_is_called(
    made: Chain, repository: Path
) -> None:
    odd = repository.rename(repository.parent / "my models' folder")
    result = CliRunner().invoke(main, ["lint", str(odd)])
    assert shlex.split(result.stdout.splitlines()[-1])[1:] == [
        "pipeline",
        "lint",
        str(odd),
        "--live",
    ]


def test_after_a_trial_of_our_own_repository_our_own_server_is_next(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [LiveTrial("handwriting", "loads")]
    monkeypatch.setattr("pipeline.serving.scratch.try_models", lambda *_: trials)
    result = chain.run("lint", str(chain.paths.repository), "--live")
    assert result.stdout.splitlines()[-1] == "next: pipeline serve --detach"


def test_a_models_own_folder_is_no_repository_and_the_right_one_is_named(repository: Path) -> None:
    with pytest.raises(PipelineError, match=f"lint its repository, {repository}"):
        lint_repository(repository / "net")
    (repository / "config.pbtxt").write_text("")  # Triton takes folders only
    assert errors(repository) == []


def test_an_error_exits_with_3_and_says_file_line_and_fix(repository: Path) -> None:
    config = repository / "net" / "config.pbtxt"
    edit(repository / "net", "max_batch_size", "max_bach_size")
    result = CliRunner().invoke(main, ["lint", str(repository)])
    assert result.exit_code == 3
    assert f"{config}:3: error: does not parse, column 1: " in result.stdout
    assert "(did you mean max_batch_size?)" in result.stdout
    assert "1 error (config-text)" in error_line(result)


def test_warnings_do_not_close_the_gate(repository: Path) -> None:
    (repository / "net" / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    result = CliRunner().invoke(main, ["--json", "lint", str(repository)])
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert (record["errors"], record["warnings"]) == (0, 1)
    (finding,) = record["findings"]
    assert (finding["rule"], finding["level"], finding["line"]) == ("labels", "warning", 5)
    assert finding["file"] == str(repository / "net" / "labels.txt")


def test_a_missing_repository_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="is not a folder: run"):
        lint_repository(tmp_path / "none")
    assert "has no model" in errors(tmp_path)[0]
    assert str(lint_repository(tmp_path)).splitlines()[-1].startswith("no model: 1 error")


def test_a_repository_that_anyone_may_write_is_refused(repository: Path) -> None:
    repository.chmod(0o777)
    assert ["is writable by everyone" in line for line in errors(repository)] == [True]
    repository.chmod(0o1777)  # as /tmp: nobody moves what is not his
    assert errors(repository) == []


def test_one_model_does_not_hide_what_is_wrong_with_another(repository: Path) -> None:
    for name in ("other", "third"):
        write_model(repository / name)
        edit(repository / name, "dims: 4", "dims: 5")
    found = errors(repository)
    assert [name for name in ("net", "other", "third") if f"/{name}/" in "".join(found)] == [
        "other",
        "third",
    ]


@pytest.mark.parametrize(
    ("release", "opset", "ir_version", "is_loaded"),
    [("24.10", 21, 10, True), ("24.10", 22, 10, False), ("23.09", 18, 10, False)],
)
def test_opset_and_ir_are_held_against_the_target(
    repository: Path, release: str, opset: int, ir_version: int, is_loaded: bool
) -> None:
    save(repository / "net", graph(opset=opset, ir_version=ir_version))
    assert errors(repository) == []
    found = errors(repository, release)
    assert (found == []) == is_loaded
    if not is_loaded:
        assert f"Triton {release} has ONNX Runtime" in found[0]
        assert "or serve it with" in found[0]


def test_an_unknown_target_is_refused(repository: Path) -> None:
    result = CliRunner().invoke(main, ["lint", str(repository), "--target-triton", "99.01"])
    assert result.exit_code == 2
    assert "99.01" in error_line(result)


@pytest.mark.parametrize(
    ("case", "fix"),
    [
        ("bracket_left_open", "close the bracket that is open before output"),
        ("shrinkage_without_an_arena", "switch enable_mem_arena on"),
        ("latest_of_none", "write num_versions: 1"),
        ("gpu_memory_with_a_unit", "write a plain number of bytes"),
        ("delay_of_an_hour", "write microseconds, such as 100"),
        ("only_a_passive_instance", "leave passive out"),
        ("file_by_its_whole_path", "Triton appends it to the version's path: write the name alone"),
    ],
)
def test_the_fix_is_one_that_helps(mutated: Path, case: str, fix: str) -> None:
    assert [finding.fix for finding in lint_model(mutated / case)] == [fix]


BRAIN_FLOATS = "Triton 24.10 has no bfloat16 tensors: 26.03 is the first that has"


def test_bfloat16_is_refused_for_a_release_without_it(mutated: Path) -> None:
    folder = mutated / "brain_floats"
    (finding,) = lint_model(folder, target("24.10"))
    assert (finding.rule, finding.level, finding.message) == ("tensor-type", "error", BRAIN_FLOATS)
    assert "26.03 or later" in finding.fix
    assert not list(lint_model(folder, target("26.03")))
    (finding,) = lint_model(folder)
    assert (finding.level, finding.message) == (
        "note",
        "opset 18, IR 9, bfloat16: Triton 26.03 and later load it",
    )


def test_without_a_release_a_note_says_which_ones_load_the_file(mutated: Path) -> None:
    folder = mutated / "opset_of_newer_releases"
    (finding,) = lint_model(folder)
    assert finding.level == "note"
    assert finding.message == "opset 23, IR 11: Triton 25.08 and later load it"
    assert "--target-triton" in finding.fix
    assert not list(lint_model(folder, target("25.08")))
    (finding,) = lint_model(folder, target("25.07"))
    assert (finding.rule, finding.level) == ("dialect", "error")


def test_a_precision_is_refused_for_a_release_without_it(repository: Path) -> None:
    folder = repository / "net"
    accelerated(folder, "tensorrt", 'parameters { key: "precision_mode" value: "BF16" }')
    assert not list(lint_model(folder, target("26.02")))
    (finding,) = lint_model(folder, target("26.01"))
    assert "Triton 26.01 has no BF16" in str(finding)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("intra_op_thread_count", "2 threads", "reads '2 threads' as 2, and ignores the rest"),
        ("inter_op_thread_count", "-3", "reads '-3' as 0, the default"),
        ("execution_mode", "0x1", "reads '0x1' as 0, and ignores the rest"),
        ("session.use_device_allocator_for_initializers", "on", "reads 'on' as 0"),
        ("memory.enable_memory_arena_shrinkages", "cpu:0", "ignores the parameter"),
    ],
)
def test_a_value_that_is_read_otherwise_is_a_warning_that_says_how(
    repository: Path, key: str, value: str, words: str
) -> None:
    set_parameter(repository / "net", key, value)
    warnings = [f for f in lint_repository(repository).findings if f.rule == "parameters"]
    assert [(f.level, words in f.message, bool(f.line)) for f in warnings] == [
        ("warning", True, True)
    ]


@pytest.mark.parametrize("value", ["4097", "2147483647"])
def test_threads_that_no_machine_starts_are_an_error(repository: Path, value: str) -> None:
    set_parameter(repository / "net", "intra_op_thread_count", value)
    assert f"a session with {value} threads may never start" in errors(repository)[0]


@pytest.mark.parametrize("value", ["cpu", "cpu:", "cpu:0;", "cpu:00", "cpu:0;cpu:0", "cpu:0:1"])
def test_every_spelling_of_an_arena_that_onnx_runtime_takes_is_taken(
    repository: Path, value: str
) -> None:
    set_parameter(repository / "net", "memory.enable_memory_arena_shrinkage", value)
    assert not lint_repository(repository).findings


@pytest.mark.parametrize("value", ["CPU:0", "cpu:1", " cpu:0", "cpu:0,gpu:0", ";", "cpu:x", "1"])
def test_an_arena_that_onnx_runtime_does_not_find_is_an_error(repository: Path, value: str) -> None:
    set_parameter(repository / "net", "memory.enable_memory_arena_shrinkage", value)
    assert "every run fails, since '" in errors(repository)[0]


def test_numbers_of_thousands_of_digits_are_no_crash(repository: Path) -> None:
    set_parameter(repository / "net", f"sha256.{'9' * 5000}", "x")
    set_parameter(repository / "net", "sha256.\u0661", "x")
    assert not lint_repository(repository).findings
    external(repository / "net", "weights.bin", 16)
    model = onnx.load(repository / "net" / "1" / "model.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[1].value = "9" * 5000
    (repository / "net" / "1" / "model.onnx").write_bytes(model.SerializeToString())
    assert "has an invalid offset" in errors(repository)[0]


@pytest.mark.parametrize("name", ["a\\000b", "x" * 256, "\u00e9" * 128, "x/" * 1500])
@pytest.mark.parametrize("field", ["default_model_filename", "label_filename", "input_data_file"])
def test_a_file_name_that_cannot_exist_is_a_finding(
    repository: Path, field: str, name: str
) -> None:
    path = repository / "net" / "config.pbtxt"
    old = {"label_filename": "labels.txt", "input_data_file": "picture"}.get(field)
    text = path.read_text()
    path.write_text(text.replace(f'"{old}"', f'"{name}"') if old else f'{text}{field}: "{name}"\n')
    assert "names a file that cannot exist" in errors(repository)[0]


def test_a_profile_is_linted_as_the_config_is(repository: Path) -> None:
    folder = repository / "net"
    (folder / "configs").mkdir()
    text = (folder / "config.pbtxt").read_text()
    (folder / "configs" / "fast.pbtxt").write_text(text.replace("dims: 4", "dims: 3"))
    (found,) = errors(repository)
    assert f"{folder / 'configs' / 'fast.pbtxt'}:13: error: tensor 'scores'" in found


def test_models_of_other_backends_are_left_to_themselves(repository: Path) -> None:
    bare(repository / "net", 'backend: "python"\n')
    (repository / "net" / "1" / "model.onnx").rename(repository / "net" / "1" / "model.py")
    (finding,) = lint_repository(repository).findings
    assert finding.level == "note"
    assert "is not checked: the backend is python" in str(finding)


@pytest.mark.parametrize("name", ["onnxruntim", "onnxruntimes", "onnx_runtime", "openvinoo"])
def test_a_backend_that_nobody_has_is_answered_with_the_nearest(
    repository: Path, name: str
) -> None:
    edit(repository / "net", '"onnxruntime"', f'"{name}"')
    assert "did you mean " in errors(repository)[0]


@pytest.mark.parametrize("name", ["1/libtriton_onnxruntime.so", "triton_python_backend_stub"])
def test_code_that_a_model_brings_is_said_and_never_run(repository: Path, name: str) -> None:
    (repository / "net" / name).write_bytes(b"")
    (finding,) = lint_repository(repository).findings
    assert (finding.rule, finding.level) == ("brings-code", "warning")


BRINGS_CODE = {
    "python": 'backend: "python"',
    "guessed": "max_batch_size: 1",
    "elsewhere": 'backend: "../../repository/elsewhere/1"',
    "agents": 'backend: "onnxruntime" model_repository_agents { agents { name: "x" } }',
    "runtime": 'backend: "onnxruntime" runtime: "model.py"',
    "operators": 'backend: "onnxruntime" model_operations { op_library_filename: "x.so" }',
    "ensemble": 'platform: "ensemble"',
    # The python backend gives these to a shell, and starts the stub that it finds in the folder.
    "group": 'backend: "onnxruntime" instance_group { name: "$(touch ran)" }',
    "file": 'backend: "onnxruntime" default_model_filename: "$(touch ran).onnx"',
    "stub": 'backend: "onnxruntime"',
}


@pytest.mark.server
def test_no_code_of_a_model_is_run_for_a_trial(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in BRINGS_CODE.items():
        write_model(repository / name)
        bare(repository / name, text)
        if name in ("python", "guessed", "elsewhere", "runtime"):
            (repository / name / "1" / "model.onnx").rename(repository / name / "1" / "model.py")
    model = repository / "file" / "1" / "model.onnx"
    model.rename(model.with_name("$(touch ran).onnx"))
    stub = repository / "stub" / "triton_python_backend_stub"
    stub.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    stub.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    trials = try_models(repository, BRINGS_CODE, Paths(REPOSITORY))
    assert not (tmp_path / "ran").exists()
    assert {trial.model: trial.outcome for trial in trials} == dict.fromkeys(
        BRINGS_CODE, "not judged"
    )


@pytest.mark.parametrize("platform", ["tensorrt_plan", "pytorch_libtorch", "ensemble"])
def test_platforms_of_others_are_left_to_themselves(repository: Path, platform: str) -> None:
    bare(repository / "net", f'platform: "{platform}"\n')
    assert [finding.level for finding in lint_repository(repository).findings] == ["note"]


def test_the_threads_of_all_instances_are_counted(repository: Path) -> None:
    edit(repository / "net", "count: 1", "count: 10000")
    (finding,) = lint_repository(repository).findings
    assert (finding.rule, finding.level) == ("threads", "warning")
    assert "10,000 instances with 1 thread for the" in finding.message


def test_a_shape_that_the_graph_computes_is_left_to_a_server(repository: Path) -> None:
    nodes = [
        onnx.helper.make_node("Shape", ["images"], ["shape"]),
        onnx.helper.make_node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Reshape", ["floats", "shape"], ["scores"]),
    ]
    outputs = [onnx.helper.make_tensor_value_info("scores", 1, ["batch", "a", "b", "c"])]
    save(repository / "net", graph(nodes, outputs=outputs))
    edit(repository / "net", 'dims: 4\n  label_filename: "labels.txt"', "dims: [ 1, 2, 2 ]")
    (finding,) = lint_repository(repository).findings
    assert (finding.rule, finding.level) == ("tensor-dims", "warning")


def test_each_field_of_a_text_has_its_line() -> None:
    text = """input [
  { name: "a" dims: [ 1,
    2 ] },
  {
    name: "b"  # dims: 3
    dims: [
      -1 ]
  }
]
parameters: { key: "x" value: { string_value: "3" } }
parameters { value { string_value: "}" }
  key: 'y.1' }
"""
    config = Config(Path("config.pbtxt"), lines=find_field_lines(text))
    for where, line in {
        "input": 1 + 1,
        "input[0].dims[1]": 3,
        "input[1]": 4,
        "input[1].name": 5,
        "input[1].dims[0]": 7,
        "input[1].dims[5]": 4,  # not there: the line of what it would be in
        "parameters[x]": 10,
        "parameters[y.1].value.string_value": 11,
        "parameters[y.1].key": 12,
        "output[3]": None,
    }.items():
        assert config.line(where) == line, where


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("max_bach_size: 3", "did you mean max_batch_size?"),
        ("input { data_type: TYPE_FLOAT }", "did you mean TYPE_FP32?"),
        ("instance_group { kind: KIND_GPUS }", "did you mean KIND_GPU?"),
        ("zzzzzz: 3", "there are: "),
        ("input {", "look at the line"),
    ],
)
def test_a_name_that_is_not_known_is_answered_with_the_nearest(
    tmp_path: Path, text: str, fix: str
) -> None:
    (tmp_path / "config.pbtxt").write_text(text)
    found = read_config(tmp_path / "config.pbtxt")
    assert isinstance(found, Finding)
    assert found.fix.startswith(fix)
    assert found.line == 1


def test_the_cause_of_a_crash_is_its_signal() -> None:
    log = "terminate called after ...\n  what():  stoll\nSignal (6) received.\n 0# 0x00\n"
    assert find_cause(log) == "the server crashes (SIGABRT, stoll)"


def test_a_pipe_in_a_models_folder_is_named_and_not_read(repository: Path) -> None:
    (repository / "net" / "1" / "model.onnx").unlink()
    os.mkfifo(repository / "net" / "1" / "model.onnx")
    assert any("is neither a file nor a folder" in line for line in errors(repository))


def test_lint_needs_no_torch_and_no_onnx_runtime() -> None:
    code = (
        "import sys, pipeline.repository.lint.check, pipeline.cli.repository;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
