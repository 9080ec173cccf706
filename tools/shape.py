"""Print the shape of the package: code lines, helpers called once, function lengths, shared names.

    python -m tools.shape [ROOT]

Code lines are those of `pipeline/` and of the modules that moved from it to `tools/`, without blank
lines, comments and docstrings. Exits with 1, and names the offenders, where `pipeline/` has too
many helpers that are called once, functions that are too long, or public names in two modules.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ONCE = 9.0  # helpers called once, in 1,000 lines of files, at most
MEDIAN, P90 = 12, 32  # lines of functions: the median and 90th percentile stay below
TWICE = 5  # public names that are defined in two modules, at most
SHOWN = 20  # offenders that are listed at most
# Modules that moved from the package to tools/, and are counted with it.
MOVED = (
    *("edge", "gpu_check", "nondigits", "photos"),
    *("prove_photos", "prove_unsure", "provenance", "readme"),
)
_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Shape:
    """Counts over the modules of a package."""

    code: int  # lines without blank ones, comments and docstrings
    lines: int  # of the files
    once: tuple[str, ...]  # functions used once, in their own module: FILE:LINE NAME
    functions: tuple[tuple[int, str], ...]  # lines of each, and FILE:LINE NAME; shortest first
    twice: dict[str, tuple[str, ...]]  # the modules of each public name that is defined in several

    @property
    def once_per_thousand(self) -> float:
        return 1000 * len(self.once) / self.lines

    @property
    def median(self) -> float:
        return statistics.median(length for length, _ in self.functions)

    @property
    def p90(self) -> int:
        """The 90th percentile of the functions' lines."""
        return self.functions[int(0.9 * len(self.functions))][0]

    def __str__(self) -> str:
        return (
            f"{self.code} code lines of {self.lines}, helpers called once "
            f"{self.once_per_thousand:.1f} per 1,000 lines ({len(self.once)}), functions median "
            f"{self.median} p90 {self.p90}, public names in two modules {len(self.twice)}"
        )


def measure(root: Path) -> Shape:
    """Count over all modules below a package's folder."""
    texts = {path: path.read_text() for path in sorted(root.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    used = {path: used_names(tree) for path, tree in trees.items()}
    everywhere: Counter[str] = sum(used.values(), Counter())
    once, functions = [], []
    defined: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                where = f"{path}:{node.lineno} {node.name}"
                functions.append(((node.end_lineno or 0) - node.lineno + 1, where))
                is_plain = not node.decorator_list and not node.name.startswith("__")
                if is_plain and used[path][node.name] == everywhere[node.name] == 1:
                    once.append(where)
        for statement in tree.body:
            if isinstance(statement, Function | ast.ClassDef) and statement.name[0] != "_":
                defined[statement.name].add(str(path))
    return Shape(
        code=sum(code_lines(text) for text in texts.values()),
        lines=sum(text.count("\n") for text in texts.values()),
        once=tuple(once),
        functions=tuple(sorted(functions)),
        twice={name: tuple(sorted(paths)) for name, paths in defined.items() if len(paths) > 1},
    )


def used_names(tree: ast.Module) -> Counter[str]:
    """Count each name that a module uses, reads as an attribute, or imports."""
    names: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names[node.id] += 1
        elif isinstance(node, ast.Attribute):
            names[node.attr] += 1
        elif isinstance(node, ast.alias):
            names[node.name] += 1
    return names


def code_lines(text: str) -> int:
    """Count the lines of a module that are neither blank, nor comments, nor docstrings."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function | ast.ClassDef | ast.Module):
            match node.body[:1]:
                case [ast.Expr(value=ast.Constant(value=str()), end_lineno=end) as docstring]:
                    code -= set(range(docstring.lineno, (end or 0) + 1))
    return len(code)


def faults(shape: Shape) -> list[str]:
    """Return a text for each limit that is exceeded: a sentence, and a line for each offender."""
    texts = []
    if shape.once_per_thousand > ONCE:
        texts.append(
            f"{shape.once_per_thousand:.1f} helpers in 1,000 lines are called once, from their own "
            f"module; at most {ONCE:g} may be. Inline some of:" + _listed(shape.once)
        )
    if shape.median >= MEDIAN or shape.p90 >= P90:
        longest = [f"{where} ({length} lines)" for length, where in shape.functions[-SHOWN:]]
        texts.append(
            f"functions have {shape.median:g} lines in the median and {shape.p90} at the 90th "
            f"percentile; these must stay below {MEDIAN} and {P90}. Split some of:"
            + _listed(longest)
        )
    if len(shape.twice) > TWICE:
        names = [f"{name} ({', '.join(paths)})" for name, paths in sorted(shape.twice.items())]
        texts.append(
            f"{len(names)} public names are defined in two modules; at most {TWICE} may be. Rename "
            "some of:" + _listed(names)
        )
    return texts


def _listed(offenders: Sequence[str]) -> str:
    return "".join(f"\n  {offender}" for offender in offenders)


def main(root: Path = Path()) -> int:
    """Print the shape of the project in `root`; return 1 if a limit is exceeded."""
    shape = measure(root / "pipeline")
    moved = sum(code_lines((root / "tools" / f"{name}.py").read_text()) for name in MOVED)
    print(shape)
    print(f"{shape.code + moved} code lines with the {moved} of what moved to tools/")
    exceeded = faults(shape)
    for text in exceeded:
        print(f"Error: {text}", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
