"""Print constraints with the lowest versions that pyproject.toml allows, for `make test-lowest`.

Needs only Python: it runs before anything is installed. What our packages need in turn is free.
"""

import re
import tomllib
from pathlib import Path

_LOWEST = re.compile(r"^([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", re.ASCII)


def lowest(pyproject: str) -> dict[str, str]:
    """Return the lowest version of each package that the project, an extra or its tests name."""
    tables = tomllib.loads(pyproject)
    extras = tables["project"]["optional-dependencies"].values()
    lines = [*tables["project"]["dependencies"], *(line for extra in extras for line in extra)]
    return {match[1]: match[2] for line in lines if (match := _LOWEST.match(line))}


if __name__ == "__main__":
    for name, version in lowest(Path("pyproject.toml").read_text("utf-8")).items():
        if name != "torch":  # make installs it first, from the index of its CPU builds
            print(f"{name}=={version}")
