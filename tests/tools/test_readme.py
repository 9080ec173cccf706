import json
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import write_json
from pipeline.training.recipes import RECIPES
from tests.conftest import REPOSITORY, Chain
from tests.report.test_page import proven
from tools import readme as report
from tools.provenance import (
    SOURCES,
    hash_recipe,
    hash_sources,
    list_stale,
    read_figure,
    write_figure,
)

FIGURES = REPOSITORY / report.RESULTS


@pytest.mark.parametrize("page", report.PAGES, ids=str)
def test_the_pages_show_the_figures_as_they_were_measured(page: Path) -> None:
    text = (REPOSITORY / page).read_text()
    assert "<!-- figures:agreement -->" in text
    assert report.render_page(text, FIGURES) == text, "python -m tools.readme"


def test_every_result_is_shown_on_a_page() -> None:
    text = "".join((REPOSITORY / page).read_text() for page in report.PAGES)
    for name in report.BLOCKS - {"native"}:  # which stands in gpu's block
        assert f"<!-- figures:{name} -->" in text


def numbers(record: Any) -> Iterator[tuple[Any, Any]]:
    """Where the numbers of a record stand: a list or a dictionary, and an index or a key."""
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        if isinstance(value, dict | list):
            yield from numbers(value)
        elif isinstance(value, int | float) and key != "schema":
            yield record, key


@pytest.mark.parametrize("name", sorted(path.stem for path in FIGURES.glob("*.json")))
def test_a_figure_with_an_edited_number_is_not_rendered(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.json"
    record = json.loads((FIGURES / file.name).read_text())
    block = f"<!-- figures:{name} -->\n<!-- /figures -->"
    for place, key in [*numbers(record)][:: max(1, len([*numbers(record)]) // 20)]:
        before, place[key] = place[key], place[key] + 1
        file.write_text(json.dumps(record))
        with pytest.raises(CorruptError, match=f"{name}.json.*its content.*{record['command']}'"):
            report.render_page(block, tmp_path)
        with pytest.raises(CorruptError, match=f"{name}.json.*its content"):
            list_stale(tmp_path)
        place[key] = before
    file.write_text(json.dumps(record))  # its numbers count, not how it is written
    assert report.render_page(block, tmp_path) != block


# What is a number in the README's prose and transcripts, and no measurement.
NOT_MEASURED = re.compile(
    r"https?://\S+|grpcs?://\S+|127\.0\.0\.1\S*"
    # versions
    r"|(Python|environment) 3\.11 to 3\.1[34]|Python 3\.14|Node 18"
    r"|Triton 2\.51|since 23\.09|26\.05 or later|opset 18"
    r"|glibc 2\.35|python3\.1[23]|\(1\.1\.1 fails"
    r"|`\"[^`]*\"`"  # values of a config
    # exit codes, and what is shown of a signature
    r"|\b70 a bug|130 interrupted|\| (70|130) \||\b(400|413|415|422|503|507)\b|port = 9000"
    r"|255 is ink|28 ?x ?28|\[batch, [\d, ]+\]|last 40 bytes|-c 40"
    # how many there are of what somebody decided
    r"|10,000 (test )?images|set of 100 images|\b100 images with"
    r"|\b20 (that no|\*?probes)|\b50\s+worst"
    r"|95 % interval|fewer than 134 validation images \(about 900 pictures\)"
    r"|50 test vectors|10 images to|16 threads at once|00000\.png|epoch \d\.00/7|\b0 s left"
    r"|[Bb]atch sizes [\d, ]+( and)? 256|other size to 256|at least 200 |16 threads"
    # what a load test sends, and when its windows agree
    r"|INPUT:3,32,32|integers from 0 to 127|texts of 128 letters|agree within 10 %|most\s+1,024"
    # limits, and what others have published
    r"|at most 8 times|256 MiB|`(fp16|exact|int8)` 0\.\d\d points|\(8,192\)|up\s+to\s+256"
    r"|10 MiB and 8\.9\s+million|10,000 pictures and 1 GiB"
    # the rule of an own network, and a licence
    r"|0\.5:0\.4:0\.4|16 or\s+32 bits|0 to 255|0\.299 R \+ 0\.587 G \+ 0\.114 B|pixel / 255"
    r"|more than 20 times as long|CC BY-SA 3\.0"
    r"|24\.5 million|8,192 to 16,384 rows|0\.76-second record|784-128-10"
)
# More than one digit, a digest, or a number with a unit.
NUMBER = re.compile(
    r"(?<![\w-])\d[\d,.]*\d|\b\d+ ?(%|[mu]?s\b|seconds|minutes|times|points|[KMG]i?B|images/s)"
    r"|\b(?=[a-f]*\d)[0-9a-f]{12,}\b|\b\d+e-?\d+"
)


def written(readme: str) -> str:
    """What stands in the README by hand: without figures, code, and commands but their comments."""
    text = re.sub(r"<!-- figures:.*?<!-- /figures -->", "", readme, flags=re.DOTALL)
    text = re.sub(r"```(python|js|sh)\n.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"^\$ [^#\n]*", "", text, flags=re.MULTILINE)


ARITHMETIC = ("images.md", "exact.md", "numbers.md")  # with numbers of rules
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
WRITTEN = [REPOSITORY / "README.md", *(page for page in DOCS if page.name not in ARITHMETIC)]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_a_measured_number_stands_in_a_figure_and_nowhere_else_on_a_page(page: Path) -> None:
    text = NOT_MEASURED.sub("", written(page.read_text()))
    found = [line for line in text.splitlines() if NUMBER.search(line)]
    assert not found, f"render them from a figure, or leave them out: {found}"


@pytest.mark.parametrize(
    "prose",
    [
        *("trained in 75.7 s", "safety factor 74", "0.089 of `baseline`'s", "after 5 minutes"),
        *("accuracy 99%", "32,800 images/s", "sha256 0e045a39f1b3", "(pid 22598)", "5 s left"),
        *("$ make all  # some 5 minutes", "1e-5 at most", "463 requests", "2 times faster"),
    ],
)
def test_a_number_of_a_measurement_is_recognized(prose: str) -> None:
    assert NUMBER.search(NOT_MEASURED.sub("", written(prose)))


def test_stale_figures_are_listed(tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    figures.mkdir()
    for name in ("swap", "soak"):
        write_figure(name, figures / f"{name}.json", {})
    rows = [{"recipe": name, "sources_sha256": hash_recipe(name)} for name in RECIPES]
    write_figure("training", figures / "training.json", {"rows": rows})
    assert list_stale(figures) == []
    write_figure("soak", figures / "swap.json", {})  # whose sources are others
    rows[0]["sources_sha256"] = "0" * 64
    write_figure("training", figures / "training.json", {"rows": rows})
    assert list_stale(figures) == ["swap.json", "training.json (quick)"]


def test_a_change_of_a_recipe_makes_its_own_row_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: hash_recipe(name) for name in ("quick", "standard")}
    monkeypatch.setitem(RECIPES, "standard", replace(RECIPES["standard"], epochs=10))
    assert hash_recipe("quick") == before["quick"]
    assert hash_recipe("standard") != before["standard"]


def test_every_figure_that_is_kept_or_asked_for_says_which_sources_decide_it() -> None:
    kept = {path.stem for path in FIGURES.glob("*.json")}
    assert SOURCES.keys() >= kept | report.BLOCKS
    if old := list_stale(FIGURES):  # told, not failed: a change need not be measured at once
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn(f"measured on other sources: {', '.join(old)}", stacklevel=1)


def test_figures_are_kept_and_rendered_into_the_readme(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chain.root)
    agreement, summary = str(chain.paths.agreement), str(chain.paths.summary)
    report.PAGES[0].write_text(
        "before\n<!-- figures:agreement -->\nold\n<!-- /figures -->\nafter\n"
    )
    with pytest.raises(PipelineError, match="make figures"):
        report.main(["agreement", agreement, summary])
    proven(chain)
    report.RESULTS.mkdir(parents=True)
    report.main(["agreement", agreement, summary])
    text = report.PAGES[0].read_text()
    assert text.startswith("before\n<!-- figures:agreement -->\n| runtime |")
    assert text.endswith("<!-- /figures -->\nafter\n")
    assert "old" not in text
    assert "Measured by `make figures`" in text
    figure = read_figure(report.RESULTS / "agreement.json")
    assert figure["sources_sha256"] == hash_sources("agreement")
    assert figure["training"]["recipe"] == "quick"
    report.PAGES[0].write_text(text.replace("Measured", "Guessed"))
    report.main([])
    assert report.PAGES[0].read_text() == text


def test_a_measurement_of_serving_is_kept_with_the_command_that_measures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = read_figure(FIGURES / "serving.json")
    monkeypatch.chdir(tmp_path)
    report.PAGES[0].write_text("<!-- figures:serving -->\n<!-- /figures -->\n")
    report.RESULTS.mkdir(parents=True)
    write_json(Path("serving.json"), {**figure, "name": "mine", "command": "another"})
    report.main(["serving", "serving.json"])
    assert "`make prove-serving NAME=mine` on" in report.PAGES[0].read_text()
    assert read_figure(report.RESULTS / "serving.json")["rows"] == figure["rows"]


def test_figures_that_nothing_renders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="'speed', which no template renders"):
        report.render_page("<!-- figures:speed -->\n<!-- /figures -->", tmp_path)


def test_old_runtimes_are_shown_with_the_file_that_each_ran(tmp_path: Path) -> None:
    block = "<!-- figures:runtimes -->\n<!-- /figures -->"
    assert "*Not measured yet*: `make prove-runtimes`." in report.render_page(block, tmp_path)
    shutil.copy(FIGURES / "runtimes.json", tmp_path)
    figure = json.loads((FIGURES / "runtimes.json").read_text())
    lines = report.render_page(block, tmp_path).splitlines()
    rows = [line for line in lines if line.startswith("| 1.")]
    assert len(rows) == len(figure["rows"])
    assert rows[0].startswith("| 1.16.3 | 23.09-24.02 | opset 18, IR 9 (the default) | 0 of 10,000")
    assert "opset 19, IR 9 (for 24.02)" in rows[1]
    assert f"`make prove-runtimes` on {figure['measured_at'][:10]}" in " ".join(lines)
