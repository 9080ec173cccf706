"""Reading of a config.pbtxt for lint: its message, the line of each field, and findings."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format

from pipeline.repository.config_pbtxt import ModelConfig

Level = Literal["error", "warning", "note"]
Problems = Iterator[tuple[str, str, str]]  # (field, problem, fix)
PARSER = "core src/filesystem/api.cc ReadTextProto"
Place = tuple[str, ...]  # path of a field, from the outermost message: ("input[1]", "dims[0]")


@dataclass(frozen=True)
class Finding:
    """A problem of a model repository: what, where, and how to fix it."""

    rule: str
    level: Level  # error: Triton rejects it, hangs, or gives wrong answers
    file: Path
    message: str  # Triton's own message where it has one
    fix: str = ""
    line: int | None = None
    source: str | None = None  # file and function of Triton's code that decides it

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else str(self.file)
        fix = f" ({self.fix})" if self.fix else ""
        return f"{place}: {self.level}: {self.message}{fix}"


@dataclass(frozen=True)
class Config:
    """A parsed config file."""

    path: Path
    message: Any = field(default_factory=ModelConfig)
    lines: dict[Place, int] = field(default_factory=dict)

    def line(self, where: str) -> int | None:
        """Return the line of a field such as `input[1].dims`, or of the closest one around it."""
        steps = re.findall(r"(\w+)(?:\[(.*?)\])?", where)
        place = tuple(f"{name}[{which or 0}]" for name, which in steps)
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place)

    def finding(
        self, rule: str, at: str, problem: str, fix: str, source: str = "", level: Level = "error"
    ) -> Finding:
        """Return a finding at the field `at` of this config."""
        return Finding(rule, level, self.path, problem, fix, self.line(at), source or None)


def read_config(path: Path) -> Config | Finding:
    """Read a config file; return a finding if it cannot be read or parsed."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return Finding("config-text", "error", path, f"cannot be read: {error.strerror}")
    text = content.decode(errors="replace")  # Triton accepts any bytes in comments
    try:
        message = text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        cause = re.sub(r"^\d+:\d+ ?: ", "", str(error)).replace("\n", " ")
        column = f", column {error.GetColumn()}" if error.GetColumn() else ""
        problem, line = f"does not parse{column}: {cause}", error.GetLine()
        return Finding("config-text", "error", path, problem, _suggest_fix(cause), line, PARSER)
    names = [message.default_model_filename, *(each.label_filename for each in message.output)]
    names += [e.input_data_file for sample in message.model_warmup for e in sample.inputs.values()]
    if any(re.search(rb"\0|[^/]{256}|.{3000}", name.encode(), re.DOTALL) for name in names):
        return Finding("config-text", "error", path, "names a file that cannot exist", "rename it")
    return Config(path, message, find_field_lines(text))


# Names of other libraries for Triton's types.
_SYNONYMS = {
    **dict.fromkeys(("TYPE_FLOAT", "TYPE_FLOAT32"), "TYPE_FP32"),
    **dict.fromkeys(("TYPE_DOUBLE", "TYPE_FLOAT64"), "TYPE_FP64"),
    **dict.fromkeys(("TYPE_HALF", "TYPE_FLOAT16"), "TYPE_FP16"),
    "TYPE_BYTES": "TYPE_STRING",
    "TYPE_LONG": "TYPE_INT64",
    "TYPE_BYTE": "TYPE_UINT8",
}


def _suggest_fix(cause: str) -> str:
    """Return the fix for a parser's message, such as the known name closest to an unknown one."""
    if "\ufeff" in cause:
        return "save it without a byte order mark"
    unknown = re.search(r'"inference\.([\w.]+)" has no (?:field|value) named "?(\w+)', cause)
    if not unknown:
        return "look at the line and at the one above it"
    if unknown[2] in _SYNONYMS:
        return f"did you mean {_SYNONYMS[unknown[2]]}?"
    outer, *inner = unknown[1].split(".")
    if unknown[2] in ModelConfig.DESCRIPTOR.fields_by_name:
        return f"close the bracket that is open before {unknown[2]}"
    file = ModelConfig.DESCRIPTOR.file
    kind: Any = file.message_types_by_name.get(outer) or file.enum_types_by_name.get(outer)
    for name in inner:
        kind = kind.nested_types_by_name.get(name) or kind.enum_types_by_name.get(name)
    # The fields of a message type, or the values of an enum type.
    names = list(getattr(kind, "values_by_name", None) or kind.fields_by_name)
    close = difflib.get_close_matches(unknown[2], names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(names))}"


_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    r"""|(?P<word>[\w.+-]+)|(?P<mark>[{}<>\[\]:,;])|(?P<newline>\n)"""
)


def find_field_lines(text: str) -> dict[Place, int]:
    """Return the line of each field of a valid text proto.

    The n-th value of a field is `name[n]`, counted from 0; the entry of a map is `name[key]`.
    """
    lines: dict[Place, int] = {}
    counts: Counter[Place] = Counter()
    line, name = 1, ""  # the name of the field whose value comes next
    in_list = awaits_value = False
    place: Place = ()  # path of the message that the scanner is in
    around: list[tuple[Place, str, bool]] = []  # stack of the messages around it
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match[0]
        opens = kind == "mark" and token in "{<"
        if opens or (awaits_value and kind in ("string", "word")):
            entered = (*place, f"{name}[{counts[*place, name]}]")
            counts[*place, name] += 1
            lines[entered] = line
        if kind == "newline":
            line += 1
        elif opens:
            around.append((place, name, in_list))
            place, in_list, awaits_value = entered, False, False
        elif kind == "mark" and token in "}>" and around:
            place, name, in_list = around.pop()
            awaits_value = in_list
        elif kind == "mark" and token in ":[]":
            in_list = token == "[" or (in_list and token == ":")
            awaits_value = token != "]"
        elif awaits_value and kind in ("string", "word"):
            awaits_value = in_list
            if name == "key" and place:  # a map's entry is named by its key
                *outer, last = place
                key = token.strip("\"'")
                renamed = (*outer, f"{last.partition('[')[0]}[{key}]")
                for old in [old for old in lines if old[: len(place)] == place]:
                    lines[(*renamed, *old[len(place) :])] = lines.pop(old)
                place = renamed
        elif kind == "word":
            name = token
    return lines
