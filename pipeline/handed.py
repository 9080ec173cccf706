"""An ONNX file that somebody hands in: read, made one file if asked for, held to the policy."""

from pathlib import Path

from pipeline import graph
from pipeline.config import TensorSpec
from pipeline.errors import CheckFailedError
from pipeline.policy import check_policy


def handed_in(path: Path, scrub: bool = False) -> bytes:
    """The bytes of an ONNX file; with `scrub`, of a copy in one file without source paths.

    Raises PipelineError when it cannot be read and CheckFailedError when it breaks the policy.
    """
    if scrub:
        model = graph.inlined(path)
        content = graph.scrub(model, model.ir_version, graph.metadata(model))
    else:
        content = graph.read(path)
    check_policy(graph.parse(content, str(path)), str(path))
    return content


def matching_signature(content: bytes, images: TensorSpec, outputs: TensorSpec) -> graph.Signature:
    """The signature of an ONNX file that somebody handed in, if it is that of its module.

    The tensors and the batch axis may have other names. Raises CheckFailedError otherwise.
    """
    model = graph.parse(content, "the file")
    found = graph.signature(model, "the file", batch=None)
    pairs = ((found.images, images, "takes"), (found.outputs, outputs, "answers"))
    wrong = [
        f"it {does} {ours}, the module {does} {theirs}"
        for ours, theirs, does in pairs
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape)
    ]
    if wrong:
        raise CheckFailedError(
            f"the file has another signature than its module: {'; '.join(wrong)}"
        )
    return found
