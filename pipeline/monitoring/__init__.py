"""Drift: a log of predictions against the reference profile of the version that made them.

Read `drift.py` first; `significance.py` has the statistics. A log holds no images and no file names
(`client/log.py` writes it). Asks no server and no model, and needs numpy only.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.monitoring.drift import watch_log as watch_log

__getattr__ = lazily(__name__, {"watch_log": "drift"})
