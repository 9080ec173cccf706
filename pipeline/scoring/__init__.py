"""Offline classification of millions of images: a source in, Parquet out, resumable.

Read `job.py` first, then `source.py`, which cuts a source into shards, and `worker.py`, which
classifies a shard. Only this package uses Ray and pyarrow. It needs no server: the selected release
of a repository runs in process.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.scoring.job import score_source as score_source
    from pipeline.scoring.settings import ScoreConfig as ScoreConfig

__getattr__ = lazily(__name__)
