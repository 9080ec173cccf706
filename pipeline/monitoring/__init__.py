"""Drift: a log of predictions compared with the reference profile of the version that made them.

Read `drift.py`, which also has the statistics. A log contains no images and no file names
(`client/log.py` writes it, `log.py` reads it). This room sends no requests, runs no model, and
needs only numpy.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.monitoring.drift import watch_log as watch_log

__getattr__ = lazily(__name__)
