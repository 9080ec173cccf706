"""Speed of recipes, runtimes and servers, and the comparison of two measurements.

Read `timing.py` first (windows and percentiles), then `inference.py`, `serving.py` and
`training.py`, one for each thing that is measured; `load.py` puts a server under full load.
This room only measures; `tools/` and `report` present the numbers.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.benchmark.inference import benchmark_inference as benchmark_inference
    from pipeline.benchmark.serving import benchmark_serving as benchmark_serving
    from pipeline.benchmark.training import benchmark_training as benchmark_training

__getattr__ = lazily(__name__)
