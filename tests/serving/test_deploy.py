import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import yaml

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import SCHEMA, write_bytes, write_json
from pipeline.core.paths import Paths
from pipeline.core.signature import IMAGES, TensorSpec, log_probabilities
from pipeline.repository import config_pbtxt, profiles
from pipeline.repository.golden import Golden, pack_golden
from pipeline.repository.settings import PackageConfig
from pipeline.serving.deploy import write_deployment
from tests.conftest import REPOSITORY, Chain, error_line, free_port

Served = tuple[Chain, dict[str, Any]]
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs promtool: make system"
)
MANIFESTS = ["autoscaler", "deployment", "disruption", "network", "probe", "service", "volume"]


def packaged(
    root: Path,
    name: str = "handwriting",
    opset: int = 18,
    ir_version: int = 9,
    shape: tuple[int, ...] = IMAGES.shape,
    config: PackageConfig = PackageConfig(),
) -> Paths:
    """A packaged model of three classes whose network was never trained: files are all we need."""
    paths = Paths(root, name=name)
    images = np.arange(2, dtype=np.uint8).reshape(2, *[1] * len(shape)) * np.ones(shape, np.uint8)
    outputs = np.array([[-0.5, -1.0, -2.0], [-4.0, -3.0, -0.1]])
    golden = Golden(images, np.array([0, 2]), outputs, np.full(2, 1e-4))
    entry = {"precision": "fp32", "allowed_error": 1e-4, "allowed_flips": 0}
    folder = paths.packaged / "1"
    validation = {"schema": SCHEMA, "passed": True, "variants": [entry]}
    contents = {
        "model.onnx": b"onnx",
        "golden.npz": pack_golden(golden),
        "validation.json": json.dumps(validation).encode(),
    }
    files = {file: write_bytes(folder / file, content) for file, content in contents.items()}
    record = {"precision": "fp32", "opset": opset, "ir_version": ir_version, "files": files}
    write_json(folder / "manifest.json", record)
    tensor = TensorSpec(IMAGES.name, IMAGES.dtype, shape)
    message = config_pbtxt.base_config(name, tensor, log_probabilities(3), "abc", config)
    message.version_policy.specific.versions.append(1)
    profiles.write_configs(paths.packaged, message, config)
    return paths


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Both kinds of files of one model. Read them; change copies."""
    paths = packaged(tmp_path_factory.mktemp("deploy"))
    write_deployment(paths, "compose")
    write_deployment(paths, "kubernetes")
    return paths


def compose_accepts(path: Path) -> bool:
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, check=False)
    return done.returncode == 0


def promtool(what: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = ["promtool", *what.split(), path.name]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)


def kubernetes_accepts(resource: Any) -> bool:
    try:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError:
        return False
    return True


def with_typo(path: Path, key: str, folder: Path) -> Path:
    """A copy of the file, with what is beside it, in which the first such key is misspelt."""
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    text = path.read_text()
    assert f"{key}:" in text
    (folder / path.name).write_text(text.replace(f"{key}:", f"{key[:-2]}{key[-1]}:", 1))
    return folder / path.name


def test_the_compose_file_is_one_and_a_typo_in_it_is_found(files: Paths, tmp_path: Path) -> None:
    path = files.deployment("compose") / "compose.yaml"
    assert compose_accepts(path)
    assert not compose_accepts(with_typo(path, "security_opt", tmp_path))


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("manifests/autoscaler.yaml", "maxReplicas"),
        ("manifests/deployment.yaml", "readOnlyRootFilesystem"),
        ("manifests/disruption.yaml", "minAvailable"),
        ("manifests/network.yaml", "policyTypes"),
        ("manifests/probe.yaml", "binaryData"),
        ("manifests/service.yaml", "targetPort"),
        ("manifests/volume.yaml", "accessModes"),
        ("fill.yaml", "mountPath"),
    ],
)
def test_each_manifest_is_one_and_a_typo_in_it_is_found(
    files: Paths, tmp_path: Path, file: str, key: str
) -> None:
    path = files.deployment("kubernetes") / file
    assert kubernetes_accepts(read(path))
    assert not kubernetes_accepts(read(with_typo(path, key, tmp_path)))


def test_every_manifest_is_checked(files: Paths) -> None:
    found = (files.deployment("kubernetes") / "manifests").iterdir()
    assert sorted(path.stem for path in found) == MANIFESTS


@needs_promtool
@pytest.mark.parametrize("kind", ["compose", "kubernetes/prometheus"])
@pytest.mark.parametrize(
    ("file", "key"), [("prometheus.yml", "rule_files"), ("alerts.yml", "expr")]
)
def test_prometheus_takes_its_files_and_a_typo_in_them_is_found(
    files: Paths, tmp_path: Path, kind: str, file: str, key: str
) -> None:
    folder = tmp_path / "prometheus"
    shutil.copytree(files.deployment(kind), folder)
    config = folder / "prometheus.yml"
    # Debian's promtool is built without Kubernetes.
    by_kubernetes, static = "kubernetes_sd_configs:\n      - role: pod", "static_configs: []"
    config.write_text(config.read_text().replace(by_kubernetes, static))
    good = promtool("check config", config)
    assert good.returncode == 0, good.stderr
    with_typo(folder / file, key, tmp_path / "typo")
    assert promtool("check config", tmp_path / "typo" / "prometheus.yml").returncode != 0


HEALTHY = {
    "up": "1x60",
    "nv_inference_request_success": "0+60x60",
    "nv_inference_request_failure": "0x60",
    "nv_inference_pending_request_count": "3x60",
    "nv_inference_queue_duration_us": "0+60000x60",  # a millisecond a request
}
IDLE = {"nv_inference_request_success": "5x60", "nv_inference_queue_duration_us": "5x60"}


@needs_promtool
@pytest.mark.parametrize(
    ("alert", "changes"),
    [
        ("", {}),
        (
            "",
            {**IDLE, "nv_inference_pending_request_count": "0x60"},
        ),
        ("TritonDown", {"up": "0x60"}),
        ("TritonDown", {"up": None}),
        ("TritonModelGone", {"nv_inference_request_success": None}),
        ("TritonFailures", {"nv_inference_request_failure": "0+1x60"}),
        ("TritonStuck", IDLE),
        ("TritonQueueLong", {"nv_inference_queue_duration_us": "0+900000x60"}),
        ("TritonRestarts", {"nv_inference_request_success": " ".join(["9+9x9"] * 6)}),
    ],
)
def test_an_alert_fires_when_it_should_and_is_silent_when_all_is_well(
    files: Paths, tmp_path: Path, alert: str, changes: dict[str, str | None]
) -> None:
    rules = files.deployment("compose") / "alerts.yml"
    fired = {rule["alert"]: False for rule in read(rules)["groups"][0]["rules"]}
    assert not alert or alert in fired
    model = {"job": "triton-handwriting", "instance": "a:8002", "model": "handwriting"}
    series = []
    for metric, values in {**HEALTHY, **changes}.items():
        labels = {key: model[key] for key in ("job", "instance")} if metric == "up" else model
        if metric == "nv_inference_request_failure":
            labels = {**labels, "reason": "BACKEND"}
        text = ",".join(f'{key}="{value}"' for key, value in labels.items())
        series += [{"series": f"{metric}{{{text}}}", "values": values}] if values else []
    silent = [name for name in fired if name != alert]
    wanted = [{"eval_time": "55m", "alertname": name, "exp_alerts": []} for name in silent]
    case = {"interval": "1m", "input_series": series, "alert_rule_test": wanted}
    cases = {"rule_files": [str(rules)], "tests": [case]}
    check = tmp_path / "check.yml"
    check.write_text(yaml.safe_dump(cases))
    done = promtool("test rules", check)
    assert done.returncode == 0, done.stdout + done.stderr
    if alert:
        wanted.append({"eval_time": "55m", "alertname": alert, "exp_alerts": []})
        check.write_text(yaml.safe_dump(cases))
        done = promtool("test rules", check)
        assert done.returncode != 0
        assert f'alertname="{alert}"' in done.stdout + done.stderr


def series_of(files: Paths) -> list[tuple[str, dict[str, str]]]:
    """Every series of Triton's that a rule asks for, with the labels that Triton sets."""
    texts = [
        files.deployment("compose") / "alerts.yml",
        files.deployment("kubernetes") / "prometheus" / "adapter.yml",
    ]
    found = re.findall(r"\b(nv_\w+)(\{[^}]*\})?", "\n".join(path.read_text() for path in texts))
    return [(name, dict(re.findall(r'(model)="([^"]*)"', labels))) for name, labels in found]


@pytest.mark.server
def test_every_series_of_the_rules_is_exposed_by_the_live_server(served: Served) -> None:
    chain, server = served
    for kind in ("compose", "kubernetes"):
        chain.record("package", "--deploy", kind)
    with urllib.request.urlopen(f"http://127.0.0.1:{server['metrics_port']}/metrics") as response:
        metrics = response.read().decode()
    wanted = series_of(chain.paths)
    assert len({name for name, _ in wanted}) == 4
    for name, labels in wanted:
        assert labels == {"model": "handwriting"}, name
        assert f'{name}{{model="handwriting"' in metrics
    assert 'reason="CANCELED"' in metrics


@pytest.mark.server
def test_the_health_checks_of_both_kinds_tell_a_right_server_from_none_or_another(
    served: Served, tmp_path: Path
) -> None:
    chain, server = served
    chain.record("package", "--deploy", "compose")
    folder = chain.paths.deployment("compose")
    check = read(folder / "compose.yaml")["services"]["triton"]["healthcheck"]["test"]
    chain.record("package", "--deploy", "kubernetes")
    manifests = chain.paths.deployment("kubernetes") / "manifests"
    pod = read(manifests / "deployment.yaml")["spec"]["template"]["spec"]["containers"][0]
    assert {tuple(pod[f"{kind}Probe"]["exec"]["command"]) for kind in ("startup", "readiness")} == {
        tuple(check[1:])
    }
    program = read(manifests / "probe.yaml")["data"]["probe.py"]
    assert program.strip() == (folder / "probe" / "probe.py").read_text().strip()

    def run(port: int, *changed: str) -> subprocess.CompletedProcess[str]:
        here = [part.replace(":8000", f":{port}") for part in check[1:]]
        here = [part.replace("/probe/", f"{folder}/probe/") for part in here]
        command = [*here[: len(here) - len(changed)], *changed]
        return subprocess.run(
            ["bash", "-c", '"$@"', "bash", *command], capture_output=True, text=True, check=False
        )

    done = run(server["http_port"])
    assert (done.returncode, done.stderr) == (0, "")
    another = str((int(check[-2]) + 1) % 10)
    wrong = run(server["http_port"], another, "f")
    assert wrong.returncode == 1
    assert f"class {another} should be highest" in wrong.stderr
    assert run(server["http_port"], "10", "f").returncode == 1
    nobody = run(free_port())
    assert nobody.returncode == 1
    assert "no answer from" in nobody.stderr
    assert "Traceback" not in wrong.stderr + nobody.stderr


def test_the_compose_file_says_what_the_packaged_model_is(tmp_path: Path) -> None:
    config = PackageConfig(instances=2, intra_op_threads=3)
    paths = packaged(tmp_path / "a $HOME b", "My_net.2", config=config)
    done = write_deployment(paths, "compose")
    assert (done.name, done.version) == ("My_net.2", 1)
    compose = read(paths.deployment("compose") / "compose.yaml")
    assert compose["name"] == "triton-my-net-2"
    service = compose["services"]["triton"]
    assert service["image"] == "nvcr.io/nvidia/tritonserver:26.05-py3"
    assert "--load-model=My_net.2" in service["command"]
    assert service["deploy"]["resources"]["limits"]["cpus"] == "7"
    (models, _) = service["volumes"]
    folder = paths.deployment("compose") / models["source"].replace("$$", "$")
    assert os.path.samefile(folder, paths.packaged)
    # The second image is the one that the reference is surest of.
    assert service["healthcheck"]["test"][-2:] == ["2", "f"]
    image = (paths.deployment("compose") / "probe" / "image").read_bytes()
    assert image == b"\x01" * 28 * 28


def test_each_release_has_a_folder_of_its_own_on_the_volume(tmp_path: Path) -> None:
    paths = packaged(tmp_path)
    write_deployment(paths, "kubernetes")
    folder = paths.deployment("kubernetes")
    (container,) = pod_of(folder)["containers"]
    (first,) = (a for a in container["args"] if a.startswith("--model-repository="))
    models = first.removeprefix("--model-repository=")
    assert re.fullmatch(r"/models/1-[0-9a-f]{12}", models)
    assert f"fill:{models}/)\n" in (folder / "fill.yaml").read_text()
    config = paths.packaged / "config.pbtxt"  # another config is another release
    config.write_text(config.read_text() + "# changed\n")
    write_deployment(paths, "kubernetes")
    (container,) = pod_of(folder)["containers"]
    assert first not in container["args"]


def test_files_that_the_container_cannot_read_are_said_with_what_mends_them(tmp_path: Path) -> None:
    paths = packaged(tmp_path)
    assert write_deployment(paths, "compose").warning == ""
    (paths.packaged / "1" / "model.onnx").chmod(0o600)
    assert (
        f"cannot read {paths.packaged}/1/model.onnx: run 'chmod"
        in write_deployment(paths, "compose").warning
    )
    assert write_deployment(paths, "kubernetes").warning == ""  # copied by its own user


def pod_of(folder: Path) -> dict[str, Any]:
    deployment = read(folder / "manifests" / "deployment.yaml")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def test_the_container_is_locked_up(files: Paths) -> None:
    compose = read(files.deployment("compose") / "compose.yaml")
    for name, service in compose["services"].items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] == "1000:1000"
        assert service["shm_size"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert all(volume["read_only"] for volume in service["volumes"])
        closed = [part for part in service["command"] if "restricted" in part]
        assert len(closed) == 2
        assert all("${TRITON_ADMIN_KEY:?" in part for part in closed)
        assert ("reservations" in service["deploy"]["resources"]) == (name == "triton-gpu")


def test_a_server_has_time_to_end_before_it_is_killed(files: Paths) -> None:
    service = read(files.deployment("compose") / "compose.yaml")["services"]["triton"]
    (exit_timeout,) = [
        int(part.split("=")[1]) for part in service["command"] if "exit-timeout" in part
    ]
    assert exit_timeout < int(service["stop_grace_period"].removesuffix("s"))
    path = files.deployment("kubernetes") / "manifests" / "deployment.yaml"
    pod = read(path)["spec"]["template"]["spec"]
    wait = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert wait + exit_timeout < pod["terminationGracePeriodSeconds"]


def test_the_autoscaler_asks_for_the_metric_that_the_adapter_makes(files: Paths) -> None:
    folder = files.deployment("kubernetes")
    (wanted,) = read(folder / "manifests" / "autoscaler.yaml")["spec"]["metrics"]
    (rule,) = read(folder / "prometheus" / "adapter.yml")["rules"]
    assert set(rule) == {"seriesQuery", "resources", "name", "metricsQuery"}
    assert wanted["pods"]["metric"]["name"] == rule["name"]["as"]
    assert wanted["pods"]["target"]["averageValue"] == "2000"


def test_selectors_find_the_pods(files: Paths) -> None:
    manifests = files.deployment("kubernetes") / "manifests"
    labels = read(manifests / "deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    assert read(manifests / "service.yaml")["spec"]["selector"] == labels
    assert read(manifests / "network.yaml")["spec"]["podSelector"]["matchLabels"] == labels
    assert read(manifests / "disruption.yaml")["spec"]["selector"]["matchLabels"] == labels


def test_a_release_that_cannot_load_the_model_is_refused_with_one_that_can(tmp_path: Path) -> None:
    paths = packaged(tmp_path, opset=21, ir_version=10)
    assert write_deployment(paths, "compose", "24.05").image.endswith(":24.05-py3")
    with pytest.raises(PipelineError, match=r"24\.04 cannot load.*opset 21.*24\.05 or later"):
        write_deployment(paths, "compose", "24.04")


def test_a_release_with_a_known_hole_is_warned_of(tmp_path: Path) -> None:
    paths = packaged(tmp_path)
    assert "older than 26.05" in str(write_deployment(paths, "compose", "24.10"))
    assert "older" not in str(write_deployment(paths, "compose", "26.07"))


def test_a_changed_model_is_not_deployed(tmp_path: Path) -> None:
    paths = packaged(tmp_path)
    (paths.packaged / "1" / "model.onnx").write_bytes(b"other")
    with pytest.raises(CorruptError, match="does not match its digest"):
        write_deployment(paths, "compose")


def test_an_image_too_large_for_a_configmap_is_refused_by_kubernetes_only(tmp_path: Path) -> None:
    paths = packaged(tmp_path, shape=(3, 600, 600))
    write_deployment(paths, "compose")
    with pytest.raises(PipelineError, match="too many for the ConfigMap"):
        write_deployment(paths, "kubernetes")


def test_the_same_package_gives_the_same_files(files: Paths) -> None:
    folder = files.exported / "deploy"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_deployment(files, "compose")
    write_deployment(files, "kubernetes")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before == after


def test_what_was_never_packaged_cannot_be_deployed(tmp_path: Path) -> None:
    result = Chain(tmp_path).run("package", "--deploy", "compose")
    assert result.exit_code == 1
    assert "run 'pipeline package'" in error_line(result)


def test_the_command_packages_nothing_and_says_what_to_type_next(tmp_path: Path) -> None:
    paths = packaged(tmp_path)
    result = Chain(tmp_path).run("package", "--deploy", "kubernetes", "--target-triton", "26.07")
    assert result.exit_code == 0, result.output
    assert "nothing was packaged" in result.stdout
    assert "next: kubectl create secret generic triton-handwriting-admin" in result.stdout
    assert not (paths.packaged / "2").exists()


@pytest.mark.parametrize(
    "options", [["--target-triton", "26.05"], ["--deploy", "compose", "--instances", "2"]]
)
def test_options_that_would_be_left_out_are_refused(tmp_path: Path, options: list[str]) -> None:
    result = Chain(tmp_path).run("package", *options)
    assert result.exit_code == 2


Values = list[float]


@pytest.mark.parametrize(
    ("values", "is_right"),
    [
        ([0.0, -1.0], True),
        ([0.0, 0.0], False),
        ([float("nan"), -1.0], False),
        ([0.0, float("nan")], False),
        ([-1.0, 0.0], False),
    ],
)
def test_equal_answers_and_nan_are_no_right_answer(values: Values, is_right: bool) -> None:
    space: dict[str, Any] = {"__name__": "probe"}
    probe = REPOSITORY / "pipeline/serving/templates/shared/probe.py"
    exec(compile(probe.read_text(), str(probe), "exec"), space)
    is_ahead: Callable[[Values, int], bool] = space["is_ahead"]
    assert is_ahead(values, 0) is is_right
