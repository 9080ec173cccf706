"""A run, or any module of PyTorch, as ONNX files with a manifest of what they were made of.

Read `export.py` first, then `subject.py` (what is exported) and `policy.py` (what a graph may
contain); `runtime.py` is an ONNX file as a predictor. `targets.py` and `runtime.py` do without
torch. Knows nothing of whether a file is right: that is `validation`.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.export.export import export_module as export_module
    from pipeline.export.export import export_run as export_run
    from pipeline.export.runtime import onnx_predictor as onnx_predictor

__getattr__ = lazily(
    __name__, {"export_module": "export", "export_run": "export", "onnx_predictor": "runtime"}
)
