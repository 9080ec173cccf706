"""The Triton model repository: config.pbtxt, profiles, versions, releases, and `lint/`.

Read `release.py` first: a version with the proof that it carries. `package.py` adds one,
`versions.py` lists and compares them, `profiles.py` writes each profile's config. Everything here
is files: nothing asks a server, and nothing needs torch.
"""

from typing import TYPE_CHECKING

from pipeline.core.lazy import lazily

if TYPE_CHECKING:
    from pipeline.repository.package import package_model as package_model
    from pipeline.repository.release import Release as Release
    from pipeline.repository.release import load_release as load_release
    from pipeline.repository.settings import PackageConfig as PackageConfig
    from pipeline.repository.versions import list_versions as list_versions

__getattr__ = lazily(
    __name__,
    {
        "PackageConfig": "settings",
        "Release": "release",
        "list_versions": "versions",
        "load_release": "release",
        "package_model": "package",
    },
)
