"""Export of a run, or of any PyTorch module, to ONNX files with a manifest of their origin.

Read `export.py` first, then `subject.py` (what is exported) and `policy.py` (what a graph may
contain); `runtime.py` makes a predictor of an ONNX file. `targets.py` and `runtime.py` do not
import torch. This room does not check whether a file's answers are correct: `validation` does.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.export.export import export_module as export_module
    from pipeline.export.export import export_run as export_run
    from pipeline.export.runtime import onnx_predictor as onnx_predictor

__getattr__ = lazily(__name__)
