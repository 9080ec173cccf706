"""The report of a run: one self-contained HTML page with all results of the run and its export.

Read `page.py` first; each section has a module that collects its content, and `figures.py` draws.
This room reads records that other rooms wrote, and measures nothing itself.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.report.page import write_page as write_page

__getattr__ = lazily(__name__)
