"""One small chain, made by the real commands on the real MNIST, that the tests read."""

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import NodeProto, TensorProto, helper
from xdist.scheduler import LoadScopeScheduling

from pipeline.cli.main import main
from pipeline.core.files import locked
from pipeline.core.paths import Paths

if TYPE_CHECKING:
    from pipeline.export.sample import Sample
    from pipeline.validation import compare

# Before torch is loaded: tests run side by side, and threads that wait for each other crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell lets its background jobs ignore Ctrl-C, and the commands that the tests start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent
# An eighth of an epoch: seconds of training, and yet a network that reads digits.
SHORT_TRAINING = ["--recipe", "quick", "--epochs", "0.125"]


class Shares(LoadScopeScheduling):  # type: ignore[misc]  # xdist ships no types
    """Gives each worker test after test; those that share a server or a fixture go to one worker.

    Not `--dist loadgroup`: xdist 3.8 sets a group that pytest 9.2 no longer reads.
    """

    def _split_scope(self, nodeid: str) -> str:
        return share(nodeid.partition("::")[0]) or nodeid


@cache
def share(file: str) -> str:
    """What the tests of a file share: a server, what processes are forked from, or fixtures."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    if "served: Served" in text:
        return "served"
    if "from tests.ranks import" in text:
        return "forked"
    return file if 'scope="module"' in text else ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Shares:
    return Shares(config, log)


@pytest.hookimpl(trylast=True)  # after those that are not asked for have gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long tests before short ones, and those that read the small chain last of either.

    One that reads it comes first: its worker makes the chain while the next has other work.
    """
    shares = {item: share(item.nodeid.partition("::")[0]) for item in items}
    reading = [item for item in items if "made" in getattr(item, "fixturenames", ())]
    sharing_it = {shares[item] for item in reading} - {""}

    def turn(item: pytest.Item) -> tuple[bool, bool, bool, bool]:
        is_long = any(item.get_closest_marker(name) for name in ("server", "slow"))
        reads = "made" in getattr(item, "fixturenames", ()) or shares[item] in sharing_it
        return item is not first, not is_long, reads, not shares[item]

    first = next(iter(reading), None)
    items.sort(key=turn)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector pass over the million objects that are imported, and stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup() -> None:
    """Once a test has exported a network, keep torch's list of operators for the next export.

    torch.onnx.export makes it again each time, which takes half of the time of a small network.
    """
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(module, "ONNXRegistry", None)
    if registry and not hasattr(registry.from_torchlib, "cache_info"):
        registry.from_torchlib = staticmethod(cache(registry.from_torchlib))
        gc.collect()
        gc.freeze()  # half a million objects more that stay


def pytest_sessionfinish() -> None:
    """Wait for the process that others were forked from, so that their time counts as ours."""
    if server := sys.modules.get("multiprocessing.forkserver"):
        server._forkserver._stop()


@dataclass(frozen=True)
class Chain:
    """A project's folder with everything in it, and a way to run commands there."""

    root: Path

    @property
    def paths(self) -> Paths:
        return Paths(self.root)

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["--root", str(self.root), *arguments])

    def record(self, *arguments: str) -> dict[str, Any]:
        """What a command that succeeds prints as JSON."""
        result = self.run("--json", *arguments)
        assert result.exit_code == 0, result.output
        record = json.loads(result.stdout)
        assert isinstance(record, dict)
        return record


def project(root: Path) -> Chain:
    """An empty project that shares this repository's cache of MNIST."""
    data = REPOSITORY / "data" / "mnist"
    assert data.is_dir(), "no data/mnist here: make data"
    (root / "data" / "mnist").mkdir(parents=True)
    for file in data.glob("*-ubyte"):
        (root / "data" / "mnist" / file.name).symlink_to(file)
    return Chain(root)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Trained, exported, validated and packaged once. Read it; `chain` is for changes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one for all workers: the first makes it, the others wait
    with locked(folder / "made.lock"):
        if not (folder / "made").exists():
            chain = project(folder / "making")
            with short_proofs():
                for command in (["train", *SHORT_TRAINING], ["export"], ["validate"], ["package"]):
                    result = chain.run(*command)
                    assert result.exit_code == 0, result.output
            chain.root.rename(folder / "made")
    return Chain(folder / "made")


FEW = 500  # of the 10,000 test images, all of which `make all` asks about
APART = 32  # batch sizes


@contextlib.contextmanager
def short_proofs(count: int = FEW) -> Iterator[None]:
    """Let `validate` ask about few images, at few batch sizes: seconds instead of twenty."""
    from pipeline.export import subject
    from pipeline.validation import compare

    whole_sample, all_runs = subject.load_sample, compare.plan_runs

    def few(paths: Paths, manifest: dict[str, Any]) -> "Sample":
        sample = whole_sample(paths, manifest)
        labels = None if sample.labels is None else sample.labels[:count]
        return replace(sample, images=sample.images[:count], labels=labels)

    def some(criterion: "compare.Criterion", count: int) -> "Iterator[compare.Run]":
        runs = all_runs(criterion, count)
        return (run for run in runs if run.is_whole or run.size % APART < 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.validation.export.load_sample", few)
        patch.setattr(compare, "plan_runs", some)
        yield


@pytest.fixture
def short_proof() -> Iterator[None]:
    with short_proofs():
        yield


@pytest.fixture
def empty(tmp_path: Path) -> Chain:
    """A project with data and nothing else."""
    return project(tmp_path / "project")


@pytest.fixture
def no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package without this repository's environments next to it, but with a Makefile."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "Makefile").touch()
    monkeypatch.setattr("pipeline.core.paths.CHECKOUT", tmp_path / "checkout")


@pytest.fixture
def chain(made: Chain, tmp_path: Path) -> Chain:
    """A copy of the small chain, to be changed."""
    root = tmp_path / "chain"
    shutil.copytree(made.root, root, symlinks=True)
    return Chain(root)


@pytest.fixture(scope="session")
def served(
    made: Chain, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Chain, dict[str, Any]]]:
    """The small chain on a real tritonserver, and what `serve` said of it."""
    chain = Chain(tmp_path_factory.mktemp("served") / "chain")
    shutil.copytree(made.root, chain.root, symlinks=True)
    link_server_environment(chain)
    server = chain.record("serve", "--detach", "--port", "auto")
    yield chain, server
    assert chain.run("serve", "stop").exit_code == 0


def link_server_environment(chain: Chain) -> None:
    environment = REPOSITORY / ".venv-triton"
    assert environment.is_dir(), "no server environment here: make .venv-triton"
    (chain.root / ".venv-triton").symlink_to(environment)


@pytest.fixture
def servable(chain: Chain) -> Iterator[Chain]:
    """A chain of one's own whose server is stopped afterwards, whatever became of it."""
    link_server_environment(chain)
    yield chain
    chain.run("serve", "stop")


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flip_bit(path: Path, position: int = -100) -> None:
    """Change one bit of a file, as a bad disk would."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def error_line(result: Result) -> str:
    """The message of a command that failed as it should: one paragraph, no traceback."""
    assert "Traceback" not in result.output, result.output
    message = result.stderr[result.stderr.index("Error: ") :]
    return message.removeprefix("Error: ").strip()


Edit = Callable[[dict[str, Any]], None]


def edit_json(path: Path, edit: Edit) -> None:
    """Change a record in place, as somebody with an editor would."""
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


CAST = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)


def small(
    batch: str | int | None = "batch",
    outputs: Sequence[str] = ("y",),
    nodes: Sequence[NodeProto] = (CAST,),
    tensors: Sequence[TensorProto] = (),
) -> onnx.ModelProto:
    """A valid graph of our signature's kind, or one that is not."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, [batch, 4])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, 4]) for n in outputs],
            tensors,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
