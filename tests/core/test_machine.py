"""The cores that a process may use: those of a container's quota, read from planted files."""

import os
from pathlib import Path

import pytest

from pipeline.core import machine
from pipeline.core.errors import CheckFailedError


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu/docker/ab/cpu.cfs"
V1_LINES = "4:memory:/docker/ab\n3:cpuset:/\n2:cpu,cpuacct:/docker/ab\n1:name=systemd:/\n0::/\n"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        pytest.param({}, 0, id="no cgroups, as on macOS"),
        pytest.param({"proc/self/cgroup": "0::/\n"}, 0, id="2: no cpu controller"),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"},
            0,
            id="2: no quota",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
            2,
            id="2: docker run --cpus 2",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
            2,
            id="2: a part of a core counts",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "25000 100000\n"},
            1,
            id="2: less than one core",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            3,
            id="2: the quota of a parent",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1_LINES,
                f"{V1}_quota_us": "400000\n",
                f"{V1}_period_us": "100000\n",
            },
            4,
            id="1: its own group",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1_LINES,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
            },
            2,
            id="1: in a container, the top is its own",
        ),
        pytest.param(
            {"proc/self/cgroup": V1_LINES, f"{V1}_quota_us": "-1\n", f"{V1}_period_us": "9\n"},
            0,
            id="1: no quota",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "soon\n"}, 0, id="not a number"
        ),
    ],
)
def test_the_quota_of_the_cgroups_is_counted_in_whole_cores(
    files: dict[str, str], cores: int, tmp_path: Path
) -> None:
    assert machine.quota_cores(plant(tmp_path, files)) == cores


def test_cores_are_those_of_the_quota_and_never_more_than_the_process_may_run_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = machine.cores()
    for quota, cores in ((1, 1), (allowed + 7, allowed), (0, allowed)):
        monkeypatch.setattr(machine, "quota_cores", lambda quota=quota: quota)
        assert machine.cores() == cores
    monkeypatch.delattr("os.sched_getaffinity")  # as on macOS
    assert machine.cores() == os.cpu_count()


@pytest.mark.parametrize(("quota", "asked", "threads"), [(0, 0, 0), (1, 0, 1), (1, 2, 2)])
def test_onnx_runtime_takes_the_threads_of_the_quota_unless_told(
    quota: int, asked: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.export import runtime

    monkeypatch.setattr(machine, "quota_cores", lambda: quota)
    monkeypatch.setattr(runtime, "quota_cores", lambda: quota)
    given = []

    def session(content: bytes, options: object, providers: object) -> None:
        given.append(options.intra_op_num_threads)  # type: ignore[attr-defined]  # no types
        raise runtime.RUNTIME_ERRORS[0]("enough")

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    with pytest.raises(CheckFailedError):
        runtime.onnx_predictor(b"", asked)
    assert given == [threads]


def test_torch_takes_the_threads_of_the_quota_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training import device

    given: list[int] = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr("torch.set_num_threads", given.append)
    monkeypatch.setattr(device, "quota_cores", lambda: 2)
    monkeypatch.setattr(device, "cores", lambda: 2)
    device.choose_placement("cpu")
    assert given == []  # OMP_NUM_THREADS is set for the tests
    monkeypatch.delenv("OMP_NUM_THREADS")
    device.choose_placement("cpu")
    assert given == [2]
    monkeypatch.setattr(device, "quota_cores", lambda: 0)
    device.choose_placement("cpu")
    assert given == [2]
