"""The limits of the package's shape, each held against a small tree that exceeds it."""

from pathlib import Path

import pytest

from tools import shape

SOUND = '''"""A module.

With a docstring.
"""

import os  # a comment


class Box:
    """A class."""

    side = """
    text that is no docstring
    """


def half(x):
    """Return a half."""
    # A comment.
    return x / 2


def quarter(x):

    return half(half(x))
'''


def tree(root: Path, **modules: str) -> Path:
    for name, text in modules.items():
        (root / "pipeline" / f"{name}.py").parent.mkdir(exist_ok=True)
        (root / "pipeline" / f"{name}.py").write_text(text)
    (root / "tools").mkdir()
    for name in shape.MOVED:
        (root / "tools" / f"{name}.py").write_text("x = 1\n")
    return root


def test_a_sound_tree_is_counted_and_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shape.main(tree(tmp_path, box=SOUND)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("9 code lines of 25, helpers called once 0.0 per 1,000 lines (0)")
    assert lines[1].startswith(f"{9 + len(shape.MOVED)} code lines with the {len(shape.MOVED)} of")


def test_a_helper_called_once_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = "def helper():\n    return 1\n\n\nVALUE = helper()\n"
    decorated = "import functools\n\n\n@functools.cache\ndef kept():\n    return 1\n\n\nkept()\n"
    assert shape.main(tree(tmp_path, once=once, decorated=decorated)) == 1
    line, offender = capsys.readouterr().err.splitlines()
    assert "are called once, from their own module; at most 9 may be" in line
    assert offender.strip() == str(tmp_path / "pipeline" / "once.py:1 helper")


def test_a_helper_that_another_module_uses_as_well_is_none(tmp_path: Path) -> None:
    once = "def helper():\n    return 1\n\n\nhelper()\n"
    other = "from pipeline.once import helper\n"
    assert shape.main(tree(tmp_path, once=once, other=other)) == 0


@pytest.mark.parametrize("lengths", [[12] * 3, [2] * 8 + [40] * 2])
def test_functions_that_are_too_long_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lengths: list[int]
) -> None:
    functions = [f"def f{n}():\n" + "    pass\n" * (length - 1) for n, length in enumerate(lengths)]
    assert shape.main(tree(tmp_path, long="\n\n".join(functions))) == 1
    line, *offenders = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: functions have ")
    assert offenders[-1].endswith(f"f{len(lengths) - 1} ({lengths[-1]} lines)")


def test_public_names_of_two_modules_are_named_from_the_sixth_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"Name{n}" for n in range(6)]
    five, six = ("".join(f"class {name}: ...\n" for name in names[:n]) for n in (5, 6))
    private = "class _Name: ...\n\n\ndef _function(): ...\n"
    assert shape.main(tree(tmp_path, one=five + private, two=six + private)) == 0
    (tmp_path / "pipeline" / "one.py").write_text(six + private)
    assert shape.main(tmp_path) == 1
    line, *offenders = capsys.readouterr().err.splitlines()
    assert "6 public names are defined in two modules; at most 5 may be" in line
    assert [offender.split()[0] for offender in offenders] == names
