"""What this machine has and lacks for the main job: train, export, validate, package, serve.

Read `checks.py` first. A library is probed in a process of its own (`probes.py`), since one that
crashes must not end the doctor: importing this room loads no torch.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.doctor.checks import examine as examine

__getattr__ = lazily(__name__, {"examine": "checks"})
