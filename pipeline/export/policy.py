"""Policy for ONNX graphs: stricter than onnx's checker, since a server will load them."""

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
from onnx import NodeProto, TensorProto
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from pipeline.core.errors import CheckFailedError
from pipeline.export import graph
from pipeline.export.sizes import STANDARD, is_whole, list_excesses

CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# ONNX Runtime on a CPU skips a Dropout that was left in training mode; other runtimes apply it.
RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike"}
    | {"RandomUniform", "RandomUniformLike"}
)
FOLDERS = ("home", "Users", "root")
SCRUB = "'--scrub' leaves them out of a copy"
# Parts of source paths in two encodings; random numbers match one by chance once in 10^13 bytes.
MARKS = tuple(
    mark.encode(encoding).strip(b"\0")
    for mark in (*map("/{}/".format, FOLDERS), "\\Users\\", "file://", "site-packages")
    for encoding in ("utf-8", "utf-16-le")
)
MAX_NODES = 30_000  # a large transformer has 5,000 nodes, 20,000 once it is quantized
SHOWN = 20  # items of one kind in a message


def check_policy(model: onnx.ModelProto, name: str) -> None:
    """Refuse what onnx's checker accepts but a server should never load.

    Allowed is one file with one version of the standard domain. Not allowed are other domains,
    functions, control flow, anything random or in training mode, weights that a client may
    override, values or computations beyond the limits in `sizes.py`, and source paths. Raises
    CheckFailedError with everything that is wrong.
    """
    parts = list(graph.message_parts(model))
    nodes = [part for part in parts if isinstance(part, NodeProto)]
    tensors = [part for part in parts if isinstance(part, TensorProto)]
    if len(nodes) > MAX_NODES:
        most = f"{MAX_NODES:,} are allowed"
        raise CheckFailedError(f"{name} breaks the graph policy: {len(nodes):,} nodes, {most}")
    problems = [*_check_operators(model, nodes)]
    if external := [tensor for tensor in tensors if graph.is_external(tensor)]:
        where = [_join(e.value for e in t.external_data if e.key == "location") for t in external]
        names = (f"{_name(t)} in {place!r}" for t, place in zip(external, where, strict=True))
        problems.append(f"external data: {_join(names)}")
    if torn := [t.name for t in tensors if not graph.is_external(t) and not is_whole(t)]:
        problems.append(f"tensors whose data do not match their dims: {_join(torn)}")
    problems += [*list_excesses(model), *_check_sources(model, parts), *_check_data(nodes, tensors)]
    if problems:
        raise CheckFailedError(f"{name} breaks the graph policy: {_shorten(problems, '; ', 9999)}")
    try:
        onnx.checker.check_model(model, full_check=True)
    # UnicodeDecodeError when the checker quotes a name that is not UTF-8.
    except (ValidationError, InferenceError, UnicodeDecodeError) as error:
        raise CheckFailedError(f"{name} is not a valid ONNX model: {error}") from error


def _join(names: Iterable[str]) -> str:
    return _shorten(sorted(set(names)))


def _name(tensor: TensorProto) -> str:
    return tensor.name or "a nameless tensor"


def _shorten(texts: list[str], separator: str = ", ", longest: int = 200) -> str:
    """Join the first SHOWN of `texts`, each cut at `longest` characters, and count the rest."""
    shown = [t if len(t) <= longest else f"{t[:longest]}..." for t in texts[:SHOWN]]
    more = len(texts) - len(shown)
    return separator.join([*shown, f"and {more:,} more"] if more else shown)


def _check_operators(model: onnx.ModelProto, nodes: list[NodeProto]) -> Iterator[str]:
    """Yield what makes the meaning of operators or values ambiguous, and forbidden operators.

    For a domain imported twice, the checker uses the first import and ONNX Runtime 1.31 the last.
    """
    domains, operators = {node.domain for node in nodes}, {node.op_type for node in nodes}
    versions: dict[str, list[int]] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain in STANDARD else entry.domain
        versions.setdefault(domain, []).append(entry.version)
    for domain, several in versions.items():
        if len(several) > 1:
            imported = " and ".join(map(str, several))
            yield f"{domain or 'the standard domain'} imported as {imported}: export with one opset"
    newest = onnx.defs.onnx_opset_version()
    if not all(1 <= version <= newest for version in versions.get("", [0])):
        yield f"no import of the standard domain between opset 1 and {newest}: export it again"
    if unused := versions.keys() - {""} - domains:
        yield f"imports that no node uses, {_join(unused)}: {SCRUB}"
    if defaults := graph.list_overridable(model):
        yield f"weights that a client may override, {_join(v.name for v in defaults)}: {SCRUB}"
    if any(entry.ref_attr_name for node in nodes for entry in node.attribute):
        yield "attributes that refer to those of a function"
    if foreign := domains - STANDARD:
        yield f"operators of domain {_join(foreign)}"
    if control := operators & CONTROL_FLOW:
        yield f"control flow: {_join(control)}"
    if chance := operators & RANDOM:
        fix = "call .eval() before the export, and give F.dropout training=self.training"
        yield f"random operators: {_join(chance)}; {fix}"
    if any(a.name == "training_mode" and a.i for node in nodes for a in node.attribute):
        yield "a batch normalization in training mode: call .eval() before the export"
    if model.functions:
        yield f"local functions: {_join(entry.name for entry in model.functions)}"
    if model.training_info:
        yield "graphs for training"


def _check_sources(model: onnx.ModelProto, parts: list[Any]) -> Iterator[str]:
    """Yield traces of the exporter; the model's own metadata may stay, unless it shows a path."""
    if any(getattr(part, "metadata_props", ()) for part in parts if part is not model):
        yield f"metadata of the exporter, which may have source paths: {SCRUB}"
    if any(getattr(part, "doc_string", "") for part in parts):
        yield f"doc strings, which may have source paths: {SCRUB}"
    public, shown = graph.public_names(model), {}
    for part, field, text in graph.texts(model):
        if field != "doc_string" and graph.shows_source(text):
            place = f"the {field} '{text}'"
            if isinstance(part, onnx.StringStringEntryProto):
                place = f"metadata '{part.key}'"
            elif isinstance(part, (onnx.ModelProto, onnx.GraphProto)):
                place = field
            shown[place] = text
    if used := sorted(public.intersection(shown.values())):
        fix = "clients use them, so export it with other names"
        yield f"source paths in the names of inputs or outputs, {_shorten(used)}: {fix}"
    if places := [place for place, text in shown.items() if text not in public]:
        yield f"source paths in {_shorten(places)}: {SCRUB}"


def _check_data(nodes: list[NodeProto], tensors: list[TensorProto]) -> Iterator[str]:
    """Yield source paths in data that the graph computes with, which cannot be removed."""
    for tensor in tensors:
        # A copy; small numbers are serialized as single bytes, as letters are.
        numbers = TensorProto(int32_data=tensor.int32_data, int64_data=tensor.int64_data)
        raw = tensor.raw_data or numbers.SerializeToString()
        where = f"in the data of {_name(tensor)}"
        if paths := [*filter(None, map(_find_path, tensor.string_data))]:
            yield f"a source path {where}: '{paths[0]}'"
        elif any(mark in raw for mark in MARKS):
            yield f"a source path {where}"
    for node in nodes:
        for entry in node.attribute:
            if paths := [*filter(None, map(_find_path, (entry.s, *entry.strings)))]:
                where = f"in '{entry.name}' of {node.op_type} {node.name}".rstrip()
                yield f"a source path {where}: '{paths[0]}'"


def _find_path(content: bytes) -> str:
    """Return the text of `content` if it shows a source path, also in UTF-16 or UTF-32."""
    text = content.replace(b"\0", b"").decode(errors="replace")
    return text[:200] if graph.shows_source(text) else ""
