import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from email.message import Message
from pathlib import Path
from unittest.mock import Mock

import click
import pytest
from click.testing import CliRunner

from pipeline.cli.benchmark import KINDS
from pipeline.cli.command import EXTRAS, OPTIONAL, Settings, next_of_packaged
from pipeline.cli.main import main
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.repository.running import Server
from pipeline.training.recipes import DEFAULT_RECIPE, RECIPES, Recipe
from tests.conftest import REPOSITORY, Chain, error_line

PIPELINE = [sys.executable, "-m", "pipeline"]


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def command_at(path: tuple[str, ...]) -> click.Command:
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_help_has_an_example(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*path, "--help"])
    assert result.exit_code == 0
    assert "Example:\n" in result.output
    assert f"pipeline {' '.join(path)}".strip() in result.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['pipeline', '--help']\n"
        "import pipeline.cli.main\n"
        "try: pipeline.cli.main.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'tritonclient', 'PIL', 'grpc'}\n"
        "heavy |= {'matplotlib', 'jinja2'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_version_is_the_distributions() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.output.startswith("pipeline, version 0.")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--version", "-v"], ["-v", "--version"]])
def test_the_long_version_names_the_libraries_and_where_to_report(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(main, arguments)
    for name in ("torch", "onnx", "onnxruntime", "tritonclient"):
        assert re.search(rf"^{name}(-gpu)? \d", result.output, re.MULTILINE), name
    assert result.output.endswith(
        "report bugs to: this package states no address: tell whoever gave it to you\n"
    )
    own = Message()
    own["Version"], own["Project-URL"] = "0.1.0", "Issues, https://example.com/bugs"
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: own)
    result = CliRunner().invoke(main, arguments)
    assert result.output.endswith("report bugs to: https://example.com/bugs\n")


def test_every_library_of_an_extra_is_known_to_the_message_that_misses_it() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {re.split(r"[\[<>=;]", line)[0].replace("-", "_") for line in lines}
    assert names - {"handwriting_pipeline", "onnxruntime_gpu"} == set(OPTIONAL)
    assert {*EXTRAS.values(), "train", "all"} == set(project["optional-dependencies"])


def test_a_misspelled_command_is_wrong_usage_with_a_suggestion() -> None:
    result = CliRunner().invoke(main, ["exprot"])
    assert result.exit_code == 2
    assert "export" in result.output


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_has_the_common_options(path: tuple[str, ...]) -> None:
    options = {option for parameter in command_at(path).params for option in parameter.opts}
    assert options >= {"--json", "--quiet", "--verbose", "--debug", "--root", "--config"}


def test_common_options_are_accepted_before_and_after_the_command(made: Chain) -> None:
    root = ["--root", str(made.root)]
    outputs = {
        CliRunner().invoke(main, arguments).stdout
        for arguments in (
            [*root, "--json", "data", "path"],
            [*root, "data", "path", "--json"],
            ["data", "path", *root, "--json"],
            ["data", *root, "path", "--json"],
        )
    }
    assert len(outputs) == 1
    assert json.loads(outputs.pop())["folder"] == str((made.root / "data" / "mnist").resolve())


@pytest.mark.slow
def test_flag_wins_over_environment_over_file_over_default(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = empty.root / "settings.toml"
    settings.write_text("[train]\nseed = 3\nepochs = 0.01\nlr = 0.5\n")
    monkeypatch.setenv("HANDWRITING_TRAIN_LR", "0.25")
    train = Mock(side_effect=PipelineError("that is enough"))
    monkeypatch.setattr("pipeline.training.run.train_run", train)
    for arguments in (["--config", str(settings), "train"], ["train", "--config", str(settings)]):
        assert "that is enough" in error_line(empty.run(*arguments, "--seed", "4"))
        _, config, *_ = train.call_args.args
        assert (config.seed, config.settings.epochs, config.settings.lr) == (4, 0.01, 0.25)
        assert config.settings.batch_size == RECIPES[DEFAULT_RECIPE].batch_size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nsead = 3", "sets 'sead', which is unknown here"),
        ("[trian]\nseed = 3", "sets 'trian', which is unknown here"),
        ("seed =", "cannot read the settings"),
    ],
)
def test_a_settings_file_with_a_mistake_is_refused(empty: Chain, text: str, said: str) -> None:
    settings = empty.root / "settings.toml"
    settings.write_text(text)
    result = empty.run("--config", str(settings), "train")
    assert result.exit_code == 1
    assert said in error_line(result)


def test_a_missing_settings_file_is_named(empty: Chain) -> None:
    result = empty.run("train", "--config", "nowhere.toml")
    assert result.exit_code == 1
    assert "nowhere.toml" in error_line(result)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("train --epochs -1", "-1.0 is not in the range 0<x<=1000"),
        ("train --epochs nan", "nan is not a number"),
        ("train --dropout 2", "2.0 is not in the range 0<=x<1"),
        ("train --optimizer foo", "'foo' is not one of 'adamw', 'adadelta', 'sgd'"),
        ("train --seed -1", "-1 is not in the range 0<=x<=2147483647"),
        ("train --channels a,b", "Invalid value for '--channels': invalid literal"),
        ("train --network net --channels 1,2", "channels must be 1 numbers of at least 1 for net"),
        ("train --dataset fashion-mnist --outliers 0.1", "is trained without outliers"),
        ("serve --http-port 0", "0 is not in the range 1<=x<=65535"),
        ("serve --http-port 8001", "three different ports are needed"),
        ("web --requests 0", "0 is not in the range x>=1"),
        ("package --max-queue-delay-us -1", "-1 is not in the range x>=0"),
        ("package --explain slow", "no profile 'slow' exists"),
        ("query x.png --min-confidence nan", "nan is not a number"),
        ("export --target-triton 99.1", "is not a Triton release"),
        ("export --opset 99", "opset 99 cannot be exported"),
        ("benchmark --what train --recipes foo", "recipe must be one of"),
        ("versions list --name a/b", "'a/b' is not a valid name"),
    ],
)
def test_a_wrong_value_exits_with_2_and_is_named(
    empty: Chain, arguments: str, problem: str
) -> None:
    result = empty.run(*arguments.split())
    assert result.exit_code == 2, result.output
    assert problem in error_line(result)


# What a number can be of, in an option's metavar or its help.
UNITS = re.compile(
    "seconds|images|classes|lines|steps|trials|requests|predictions|version|probability|opset"
    "|seed|port|copies|threads|operators|cores|processes|epochs|fraction|rate|pixels|radians"
    "|logarithm|tangent",
    re.IGNORECASE,
)


def test_every_option_says_what_it_does_its_choices_its_limits_and_its_unit() -> None:
    wrong = []
    for path in commands():
        for option in command_at(path).params:
            if not isinstance(option, click.Option):
                continue
            name, metavar = " ".join((*path, option.opts[-1])), option.make_metavar(CONTEXT)
            text = (option.help or "").partition("  [")[0]
            if not text.endswith("."):
                wrong.append(f"{name} has no sentence of help: {text}")
            if re.match("BOOLEAN|FUNC|LAMBDA|_?PARSE", metavar) and not option.is_flag:
                wrong.append(f"{name} says nothing of its values: {metavar}")
            is_limited = isinstance(option.type, click.IntRange | click.FloatRange)
            is_number = isinstance(option.type, click.types.IntParamType)
            if (is_limited or is_number) and not option.is_flag:
                if not UNITS.search(f"{metavar} {text}"):
                    wrong.append(f"{name} has no unit: {metavar} {text}")
                if not is_limited and option.name != "opset":  # limited by --target-triton
                    wrong.append(f"{name} has no limits")
    assert not wrong


CONTEXT = click.Context(main)


def test_a_recipes_options_have_the_choices_and_limits_of_its_fields() -> None:
    options = {option.name: option.type for option in command_at(("train",)).params}
    for field in fields(Recipe):
        kind = options[field.name]
        if "choices" in field.metadata:
            assert isinstance(kind, click.Choice)
            assert tuple(kind.choices) == field.metadata["choices"]
        elif field.type in (int, float):
            assert isinstance(kind, click.IntRange | click.FloatRange)
            assert kind.min == field.metadata["limits"].min
            assert kind.max == field.metadata["limits"].max


SERVER = Server(
    *("handwriting-0", 1, 1, 1, 1, 8000, 8001, 8002, "key", "wheel", "", {"letters": 1}),
    *(True, 0.0, 0, "", "/"),
)


@pytest.mark.parametrize(
    ("name", "server", "following"),
    [
        ("letters", None, "pipeline serve --detach"),
        ("letters", SERVER, "pipeline query --name letters IMAGE, pipeline web --name letters"),
        ("handwriting", SERVER, "pipeline serve restart"),  # it runs, without this model
    ],
)
def test_the_next_command_of_a_packaged_model_knows_what_runs(
    monkeypatch: pytest.MonkeyPatch, name: str, server: Server | None, following: str
) -> None:
    monkeypatch.setattr("pipeline.repository.running.find_running", lambda paths: server)
    assert next_of_packaged(Paths(name=name)) == following


def test_the_next_command_is_one_that_the_shell_finds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/pipeline", "train"])
    monkeypatch.setenv("PATH", str(tmp_path))
    Settings().result({}, "done", "pipeline query IMAGE, pipeline web")
    (tmp_path / "pipeline").touch(0o755)  # as in an environment that is activated
    Settings().result({}, "done", "pipeline export")
    assert capsys.readouterr().out.splitlines() == [
        *("done", "next: .venv/bin/pipeline query IMAGE, .venv/bin/pipeline web"),
        *("done", "next: pipeline export"),
    ]


def test_a_damaged_record_of_a_server_stops_no_other_command(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    paths.server.parent.mkdir()
    paths.server.write_text("{")
    assert next_of_packaged(paths) == "pipeline serve --detach"


@pytest.mark.parametrize(
    "command",
    [
        *("validate", "package", "versions list", "versions promote 2", "drift log.jsonl"),
        *("query 7.png", "web", "score data --output scored"),
        *("benchmark --what infer", "benchmark --what serve"),
    ],
)
def test_an_unknown_model_is_named_with_those_that_exist(made: Chain, command: str) -> None:
    result = made.run(*command.split(), "--name", "handwritng")
    assert result.exit_code == 1
    assert error_line(result) == (
        "there is no model 'handwritng' here: there is handwriting. Did you mean 'handwriting'?"
    )


def test_a_query_without_a_picture_is_wrong_usage(empty: Chain) -> None:
    result = empty.run("query")
    assert result.exit_code == 2
    assert "Missing argument 'FILE|FOLDER|-...'" in error_line(result)


def test_a_folder_that_is_no_project_is_named_with_the_option_that_names_another(
    empty: Chain,
) -> None:
    result = empty.run("validate")
    assert "none exists yet. Go to the project's folder, or name it with --root" in (
        error_line(result)
    )
    result = empty.run("query", str(REPOSITORY / "docs/images/page.png"))
    assert result.exit_code == 5
    root = empty.paths.root.resolve()
    assert f"{root} has no packaged model. Name the project's folder with --root" in (
        error_line(result)
    )
    result = empty.run("validate", "nowhere")
    assert error_line(result) == "nowhere does not exist: run 'pipeline package' first"


@pytest.mark.parametrize("command", ["export", "report"])
def test_an_unknown_run_is_named_with_those_that_exist(made: Chain, command: str) -> None:
    result = made.run(command, "--run", "handwritng")
    assert result.exit_code == 1
    assert "no run 'handwritng' here: there is handwriting. Did you mean" in error_line(result)


def test_an_unknown_folder_of_pictures_is_named_with_the_data_that_is_here(made: Chain) -> None:
    result = made.run("data", "verify", "--dataset", "folder:/nowhere/mnst")
    assert result.exit_code == 1
    assert "folder:/nowhere/mnst is not a folder" in error_line(result)
    assert "there is mnist. Did you mean 'mnist'?" in error_line(result)


def test_benchmark_asks_what_to_measure(empty: Chain) -> None:
    result = empty.run("benchmark")
    assert result.exit_code == 2
    for kind, measured in KINDS.items():
        assert re.search(f"^  --what {kind} +{re.escape(measured)}$", result.stderr, re.MULTILINE)


def test_help_lists_the_commands_in_the_order_of_work_with_whole_sentences() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    listed = re.findall(r"^  ([a-z]+)  ", output.partition("Commands:")[2], re.MULTILINE)
    assert listed[:5] == ["data", "train", "runs", "export", "validate"]
    assert listed.index("package") < listed.index("serve") < listed.index("query")
    for path in commands():
        assert (
            "..."
            not in CliRunner().invoke(main, [*path, "--help"]).output.partition("Commands:")[2]
        )


def test_a_bug_exits_70_with_its_traceback(empty: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pipeline.data.splits.verify", broken)
    result = empty.run("data", "verify")
    assert result.exit_code == 70
    assert "ZeroDivisionError" in result.stderr
    assert "Please report it" in result.stderr


def test_ctrl_c_exits_130(empty: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.data.splits.verify", interrupted)
    result = empty.run("data", "verify")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback_of_an_error(empty: Chain) -> None:
    result = empty.run("--debug", "export")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_quiet_leaves_standard_error_empty(made: Chain) -> None:
    result = made.run("-q", "data", "verify")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.count("ubyte") == 4


def test_sample_writes_digits_to_ask_about(made: Chain, tmp_path: Path) -> None:
    record = made.record("data", "sample", str(tmp_path / "digits"), "--count", "3")
    assert record["labels"] == ["7", "2", "1"]
    assert [Path(file).name for file in record["files"]] == ["00000.png", "00001.png", "00002.png"]


def test_of_many_samples_some_labels_are_named_and_what_follows_can_be_typed(
    made: Chain, tmp_path: Path
) -> None:
    folder = tmp_path / "my digits"
    said, following = made.run("data", "sample", str(folder), "--count", "30").stdout.splitlines()
    assert said.startswith(f"wrote 30 images to {folder}, which show 7, 2, 1, ")
    assert said.endswith(", ...")
    serve = ["pipeline", "serve", "--detach", "&&"]
    assert shlex.split(following) == ["next:", *serve, "pipeline", "query", str(folder)]


def test_an_unwritable_root_is_one_sentence(tmp_path: Path, made: Chain) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "data").symlink_to(made.root / "data")
    (tmp_path / "runs").symlink_to(file)
    result = Chain(tmp_path).run("train", "--recipe", "quick", "--epochs", "0.01")
    assert result.exit_code == 1
    assert "cannot write" in error_line(result)


# The README.

README = (REPOSITORY / "README.md").read_text()
CODE = re.findall(r"```(?:console|bash|sh)\n(.*?)```", README, re.DOTALL)
LINES = [line.removeprefix("$ ") for block in CODE for line in block.splitlines()]
TYPED = [line for line in LINES if line.startswith(("pipeline ", "make "))]


def test_the_readme_shows_the_main_commands() -> None:
    shown = " ".join(TYPED)
    for command in ("make all", "make test", "train", "validate", "serve", "query"):
        assert command in shown


@pytest.mark.parametrize("line", [line for line in TYPED if line.startswith("pipeline ")])
def test_every_pipeline_command_of_the_readme_exists(line: str) -> None:
    command: click.Command = main
    words = shlex.split(line.partition("#")[0].partition("|")[0].partition(";")[0])[1:]
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"{word} in {line}"
    assert not isinstance(command, click.Group) or not words or words[0].startswith("-"), line


@pytest.mark.parametrize("line", [line for line in TYPED if line.startswith("make ")])
def test_every_make_target_of_the_readme_exists(line: str) -> None:
    targets = set(re.findall(r"^([\w.-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    words = line.partition("#")[0].split()[1:]
    assert {word for word in words if "=" not in word} <= targets


def test_make_alone_lists_every_target_that_people_type() -> None:
    environment = {key: v for key, v in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True, env=environment
    )
    for target in ("all", "data", "train", "export", "validate", "package", "serve", "test"):
        assert f"make {target} " in done.stdout


@pytest.mark.parametrize("given", ["", "DATASET=fashion-mnist"])
def test_make_all_ends_with_commands_to_paste(given: str) -> None:
    environment = {key: v for key, v in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", "all", "TORCH_INDEX=", *given.split()],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    name = " --name fashion-mnist" if given else ""
    pasted = ["source .venv/bin/activate", "pipeline serve --detach", f"pipeline web{name}"]
    assert re.findall("'([^']*)'", done.stdout)[-3:] == pasted
    for command in pasted[1:]:
        assert command.split()[1] in main.commands


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", [["--help"], ["export", "--list-targets"]])
def test_output_onto_a_full_disk_is_an_error_in_a_line_and_no_bug(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    said = "Error: cannot write (No space left on device): free some space, or write elsewhere\n"
    assert done.stderr == said


def test_a_line_of_progress_is_taken_away_before_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    settings = Settings(updated=0)
    settings.update("half-way")
    settings.result({}, "done")
    shown = capsys.readouterr()
    assert shown.err == "\r\x1b[Khalf-way\r\x1b[K"
    assert shown.out == "done\n"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["validate", "--name", ""], ["validate", "--name="], ["versions", "list", "--name", ""]),
        *(["export", "--run", ""], ["train", "--run="], ["train", "--dataset", ""]),
        *(["--root", "", "train"], ["train", "--root="], ["serve", "--profile", ""]),
        *(["query", ""], ["validate", ""], ["score", "x", "--output", ""]),
    ],
    ids=" ".join,
)
def test_an_empty_value_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "the value is empty" in error_line(result) or "--dataset" in arguments


def test_an_empty_name_in_a_file_of_settings_is_not_the_default(empty: Chain) -> None:
    (empty.root / "settings.toml").write_text('[versions.list]\nname = ""\n')
    result = empty.run("--config", str(empty.root / "settings.toml"), "versions", "list")
    assert result.exit_code == 2
    assert error_line(result).startswith("'' is not a valid name")


def test_verbose_keeps_a_line_of_progress_every_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.cli.command.time.monotonic", lambda: now[0])
    for is_verbose, lines in ((False, ["step 100", "step 200"]), (True, 20)):
        now[0] = 0.0
        settings = Settings(verbose=is_verbose, updated=0.0)
        for step in range(201):
            now[0] = step / 10
            settings.update(f"step {step}")
        shown = capsys.readouterr().err.splitlines()
        assert (len(shown) if is_verbose else shown) == lines


def test_threads_that_wait_do_not_spin_unless_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = ["runs", "list", "--root", str(tmp_path)]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    CliRunner().invoke(main, command)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    del os.environ["OMP_WAIT_POLICY"]
    CliRunner().invoke(main, command)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
