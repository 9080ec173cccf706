import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import click
import pytest
from click.testing import CliRunner

from pipeline.cli.command import Settings
from pipeline.cli.main import main
from pipeline.core.errors import PipelineError
from pipeline.training.recipes import DEFAULT_RECIPE, RECIPES
from tests.conftest import REPOSITORY, Chain, error_line

PIPELINE = [sys.executable, "-m", "pipeline"]


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


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


def test_a_misspelled_command_is_wrong_usage_with_a_suggestion() -> None:
    result = CliRunner().invoke(main, ["exprot"])
    assert result.exit_code == 2
    assert "export" in result.output


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_has_the_common_options(path: tuple[str, ...]) -> None:
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
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


def test_a_setting_that_makes_no_sense_is_one_line_and_exit_1(empty: Chain) -> None:
    result = empty.run("train", "--epochs", "-1")
    assert result.exit_code == 1
    assert "epochs must be above 0" in error_line(result)


def test_channels_that_are_no_numbers_are_wrong_usage(empty: Chain) -> None:
    assert empty.run("train", "--channels", "a,b").exit_code == 2


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
    assert shlex.split(following) == ["next:", "pipeline", "query", str(folder)]


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
    assert result.exit_code == 1
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
