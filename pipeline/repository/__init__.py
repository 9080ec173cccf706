"""The Triton model repository: config.pbtxt, profiles, versions, releases, and `lint/`.

Read `release.py` first: a packaged version with its evidence. `package.py` adds a version,
`versions.py` lists and compares versions, `profiles.py` writes the config of each profile. This
room works on files only: it sends no requests to a server and does not need torch.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.repository.package import package_model as package_model
    from pipeline.repository.release import Release as Release
    from pipeline.repository.release import load_release as load_release
    from pipeline.repository.settings import PackageConfig as PackageConfig
    from pipeline.repository.versions import list_versions as list_versions

__getattr__ = lazily(__name__)
