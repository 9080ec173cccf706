"""README and docs: every command that they show exists, every link leads somewhere."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipeline.cli.main import main
from pipeline.core.files import sha256
from tests.conftest import REPOSITORY, Chain, flip_bit

NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "exported/README.md")
PAGES = [REPOSITORY / name for name in NAMES] + sorted((REPOSITORY / "docs").glob("*.md"))
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def typed(page: Path) -> Iterator[str]:
    """Lines of a page's console and shell blocks, and code in its prose, that are commands."""
    text = page.read_text()
    for block in re.findall(r"```(?:console|bash|sh)\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            for part in line.removeprefix("$ ").split(" | "):
                if part.startswith(("pipeline ", "make ")):
                    yield part
    for part in re.findall(r"`((?:pipeline|make) [^`]*)`", CODE.sub("", text)):
        yield re.sub(r"\s+", " ", part)


COMMANDS = sorted({(page.name, line) for page in PAGES for line in typed(page)})


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if line[0] == "p"}))
def test_every_pipeline_command_of_a_page_exists(line: str) -> None:
    command: click.Command = main
    words = shlex.split(line.partition("#")[0].partition(";")[0].partition(" && ")[0])[1:]
    options = {"--config": 1}
    while words and words[0] in options:
        words = words[2:]
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in parameter.opts}
    for word in words:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known, f"{word} in {line}"
    is_group = isinstance(command, click.Group)
    assert not is_group or not words or words[0].startswith("-") or words[0].isupper(), line


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if line[0] == "m"}))
def test_every_make_target_of_a_page_exists(line: str) -> None:
    targets = set(re.findall(r"^([\w.-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    targets |= {"prove-*", "prove-<what>"}
    words = shlex.split(line.partition("#")[0].partition(" && ")[0])[1:]
    assert {word for word in words if "=" not in word} <= targets


@pytest.mark.slow
def test_the_chain_of_the_api_page_makes_a_packaged_version(
    tmp_path: Path,
    short_proof: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chain = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "api.md").read_text(), re.S)[
        0
    ]
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "data").symlink_to(REPOSITORY / "data")
    monkeypatch.chdir(tmp_path)
    exec(chain.replace('of("quick")', 'of("quick", epochs=0.05)'), {})
    folder, digest = capsys.readouterr().out.split()[-2:]
    assert sha256(tmp_path / folder / "model.onnx") == digest


def anchors(page: Path) -> set[str]:
    """The anchors that a code host gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]*)\)", CODE.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        goal = (page.parent / name).resolve() if name else page
        assert goal.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(goal), f"{page.name}: {target}"


def test_a_broken_link_and_a_missing_anchor_are_recognized(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A first heading\n[there](#a-first-heading) [gone](gone.md)\n")
    assert anchors(page) == {"a-first-heading"}
    with pytest.raises(AssertionError, match=r"gone\.md"):
        test_every_link_of_a_page_leads_somewhere(page)
    page.write_text("[there](#nowhere)\n")
    with pytest.raises(AssertionError, match="#nowhere"):
        test_every_link_of_a_page_leads_somewhere(page)


def test_every_page_of_the_docs_can_be_reached_from_the_first_page() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f"(docs/{page.name}" in readme


def test_the_first_page_is_short_and_its_first_command_near_its_top() -> None:
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert next(i for i, line in enumerate(lines) if line.startswith("$ ")) < 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_prose_is_longer_than_120_characters(page: Path) -> None:
    prose = [line for line in CODE.sub("", page.read_text()).splitlines() if line[:1] != "|"]
    assert [line for line in prose if len(line) > 120] == []


@pytest.mark.skipif(
    not all(map(shutil.which, ("model_signing", "openssl"))),
    reason="no model_signing on the PATH: pip install model-signing pyopenssl",
)
def test_a_signed_version_is_verified_and_a_changed_one_is_not(chain: Chain) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "docs" / "signing.md").read_text(), re.S)
    keys, sign, verify = (re.sub(r"^pip .*\n", "", block) for block in blocks)

    def run(script: str) -> int:
        command = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(command, cwd=chain.root, capture_output=True, check=False).returncode

    assert [run(keys), run(sign), run(verify)] == [0, 0, 0]
    flip_bit(chain.paths.packaged / "1" / "model.onnx")
    assert run(verify) == 1
