"""Checks of this machine for the main job: train, export, validate, package, serve.

Read `checks.py` first. Each library is probed in a separate process (`probes.py`), because a
library that crashes must not end the doctor. Importing this room loads no torch.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.doctor.checks import examine as examine

__getattr__ = lazily(__name__)
