"""Digests of measured code: of what it does, not of where and how it is written."""

from pathlib import Path

import pytest

from pipeline.core.files import sha256
from tools import provenance
from tools.provenance import hash_sources, list_statements

SAMPLE = '''
"""A module."""

import math
from typing import TYPE_CHECKING

from pipeline import store

if TYPE_CHECKING:
    from pathlib import Path

LIMIT: int = 3  # a comment


class Box:
    """A class."""

    side: float = -0.5


def told(first, /, *rest, wide=None, **others):
    """A function."""
    from pipeline.core.errors import PipelineError

    if first is ...:
        raise PipelineError(f"{first!r:>{wide}} of {LIMIT:,} " "in 'pipeline.store.remove'")
    return {**others, "digest": store.sha256(b"\\x00"), "half": 1e-30, None: [x for x in rest]}
'''


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one module, `store`, in place of ours."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "store.py").touch()
    monkeypatch.setattr(provenance, "PACKAGE", folder)
    return folder


def test_every_python_writes_the_syntax_alike() -> None:
    digest = sha256("\n".join(list_statements(SAMPLE)).encode())
    assert digest == "9fb1694d25dba0f186105fffe0eccd3c104b90e9408a36c35611bd493b72925d"


def test_layout_comments_docstrings_and_imports_do_not_count() -> None:
    plain = "import math\n\n\ndef half(x: float) -> float:\n    return math.floor(x) / 2\n"
    told = (
        '"""A module."""\nfrom __future__ import annotations\nimport math, os  # both\n'
        'def half(\n    x: float,\n) -> float:\n    """Half."""\n    import sys\n'
        "    return math.floor(x) / 2  # rounded\n"
    )
    assert list_statements(plain) == list_statements(told)


def test_where_a_definition_is_imported_from_does_not_count() -> None:
    by_module = "from pipeline import store\ndigest = store.sha256(b'')\n"
    by_name = "from pipeline.store import sha256\ndigest = sha256(b'')\n"
    another = "from pipeline.store import read_json\ndigest = read_json(b'')\n"
    assert list_statements(by_module) == list_statements(by_name) != list_statements(another)


@pytest.mark.parametrize(
    ("old", "new"), [("3", "4"), ("-0.5", "0.5"), ("PipelineError(", "ValueError("), (">{", "<{")]
)
def test_a_change_of_the_code_counts(old: str, new: str) -> None:
    assert list_statements(SAMPLE.replace(old, new)) != list_statements(SAMPLE)


def test_code_that_moves_to_another_source_keeps_the_figures_digest(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(provenance.SOURCES, "swap", ("a.py", "b.py"))
    one, two = "def one() -> int:\n    return 1\n", "def two() -> int:\n    return 2\n"
    digests = set()
    for first, second in ((one, two), (two, one), ("", one + two)):
        (package / "a.py").write_text(first)
        (package / "b.py").write_text(second)
        digests.add(hash_sources("swap"))
    assert len(digests) == 1
    (package / "a.py").write_text(one.replace("1", "2"))
    assert hash_sources("swap") not in digests
