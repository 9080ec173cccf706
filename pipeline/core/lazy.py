"""Lazy loading of a room's public names, each at its first use (PEP 562)."""

import ast
import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


def lazily(room: str) -> Callable[[str], Any]:
    """Return a room's `__getattr__`, which imports each public name from its module.

    The names are those that the room imports as themselves, for type checkers only (PEP 484), so
    each is written once. Scientific Python's lazy_loader reads them from a stub file instead.
    """

    @cache
    def find_modules() -> dict[str, str]:
        nodes = ast.walk(ast.parse(Path(str(sys.modules[room].__file__)).read_bytes()))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        return {a.name: str(node.module) for node in imports for a in node.names if a.asname}

    def load(name: str) -> Any:
        if name not in find_modules():
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(find_modules()[name]), name)

    return load
