import itertools
import subprocess
import sys

import onnx.helper
import pytest

from pipeline.core.errors import PipelineError
from pipeline.export import targets
from pipeline.export.targets import (
    OPSETS,
    SPANS,
    ExportConfig,
    Target,
    find_oldest,
    onnx_dialect,
    target,
)


@pytest.mark.parametrize(
    ("release", "wanted"),
    [
        ("23.09", Target("23.09", "23.09", "1.16", 9, 19)),
        ("24.02", Target("24.02", "24.02", "1.16", 9, 19)),
        ("24.03", Target("24.03", "24.03", "1.17", 9, 20)),
        ("24.12", Target("24.12", "24.12", "1.20", 10, 21)),
        ("25.01", Target("25.01", "25.01", "1.20", 10, 21)),
        ("26.07", Target("26.07", "26.07", "1.27", 13, 26)),
    ],
)
def test_a_release_loads_what_its_onnx_runtime_loads(release: str, wanted: Target) -> None:
    assert target(release) == wanted


@pytest.mark.parametrize(
    "text", ["", "latest", "24", "24.2", "2024.02", "24.00", "24.13", "24.0\u0662"]
)
def test_what_is_no_year_and_month_is_refused_with_the_known_range(text: str) -> None:
    with pytest.raises(PipelineError, match=r"is not a Triton release.*YY\.MM.*23\.09 to 26\.07"):
        target(text)


def test_a_release_before_the_first_known_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"23\.08 is too old: releases 23\.09 to 26\.07"):
        target("23.08")


def test_a_release_after_the_last_known_is_refused_with_what_loads_there() -> None:
    with pytest.raises(PipelineError, match=r"26\.08 is too new.*Export for 26\.07: later"):
        target("26.08")


def next_month(release: str) -> str:
    year, month = map(int, release.split("."))
    return f"{year + month // 12:02}.{month % 12 + 1:02}"


def test_every_month_from_first_to_last_is_in_one_span() -> None:
    for before, after in itertools.pairwise(SPANS):
        assert before.first <= before.last
        assert next_month(before.last) == after.first


def test_without_a_release_the_default_is_exported() -> None:
    assert onnx_dialect() == ExportConfig()
    assert onnx_dialect(opset=20) == ExportConfig(20, 9)
    assert onnx_dialect(opset=21) == ExportConfig(21, 10)


@pytest.mark.parametrize("opset", OPSETS)
def test_an_opset_goes_with_the_ir_that_onnx_released_it_with(opset: int) -> None:
    official = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    assert onnx_dialect(opset=opset).ir_version == max(official, ExportConfig.ir_version)


@pytest.mark.parametrize("opset", [0, 17, 26])
@pytest.mark.parametrize("release", [None, "26.07"])
def test_an_opset_that_the_exporter_does_not_write_is_refused(
    release: str | None, opset: int
) -> None:
    with pytest.raises(PipelineError, match=f"opset {opset} cannot be exported: choose 18 to 25"):
        onnx_dialect(release, opset)


@pytest.mark.parametrize(
    ("release", "wanted"),
    [
        ("24.02", ExportConfig(19, 9)),
        ("24.04", ExportConfig(20, 9)),
        ("24.07", ExportConfig(21, 10)),
        ("25.02", ExportConfig(21, 10)),
        ("25.07", ExportConfig(22, 10)),
        ("26.01", ExportConfig(23, 11)),
        ("26.06", ExportConfig(25, 13)),
        ("26.07", ExportConfig(25, 13)),
    ],
)
def test_a_release_gets_the_newest_that_it_loads_and_we_write(
    release: str, wanted: ExportConfig
) -> None:
    assert onnx_dialect(release) == wanted


@pytest.mark.parametrize("span", SPANS, ids=lambda span: span.first)
def test_a_release_loads_what_is_exported_for_it_and_no_opset_above(span: Target) -> None:
    ours = onnx_dialect(span.first)
    assert ours.ir_version <= span.ir_version
    assert ours.opset == min(span.opset, OPSETS[-1])
    assert onnx_dialect(span.first, 18) == ExportConfig()
    if span.opset < OPSETS[-1]:
        with pytest.raises(PipelineError, match="cannot load opset"):
            onnx_dialect(span.first, span.opset + 1)


def test_an_opset_above_the_releases_is_refused_with_a_way_out() -> None:
    with pytest.raises(PipelineError) as caught:
        onnx_dialect("24.02", 21)
    assert str(caught.value) == (
        "Triton 24.02 cannot load opset 21: its ONNX Runtime 1.16 loads up to 19. "
        "Choose a lower opset, or Triton 24.05 or later"
    )


def test_a_file_is_loaded_by_the_oldest_release_that_knows_its_opset_and_ir() -> None:
    assert find_oldest(18, 9) == target("23.09")
    assert find_oldest(19, 10) == target("24.05")
    assert find_oldest(22, 10) == target("25.03")
    assert find_oldest(24, 12) == target("26.02")
    assert find_oldest(27, 13) is None
    assert find_oldest(18, 14) is None


def test_the_listing_has_a_line_for_each_span_and_one_for_the_default() -> None:
    header, *lines, default = targets.format_targets().splitlines()
    assert header == "Triton        ONNX Runtime  loads up to      exported for it"
    assert [line.split()[0] for line in lines] == [span.releases for span in SPANS]
    assert lines[0].split(maxsplit=1)[1] == "1.16          opset 19, IR 9   opset 19, IR 9"
    assert lines[-1].endswith("opset 26, IR 13  opset 25, IR 13")
    assert default.startswith("Without a target: opset 18, IR 9")


def test_the_records_say_what_the_listing_says() -> None:
    first, *_, last = targets.records()
    assert first == {
        "first": "23.09",
        "last": "24.02",
        "onnxruntime": "1.16",
        "ir_version": 9,
        "opset": 19,
        "export": {"opset": 19, "ir_version": 9},
    }
    assert last["export"] == {"opset": 25, "ir_version": 13}
    assert len(targets.records()) == len(SPANS)


def test_targets_need_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'numpy'}"
    code = f"import sys, pipeline.export.targets; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
