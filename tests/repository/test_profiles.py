from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tritonclient.grpc as grpc

from pipeline.client.client import Client
from pipeline.core.errors import PipelineError
from pipeline.core.signature import IMAGES, log_probabilities
from pipeline.repository import config_pbtxt, profiles
from pipeline.repository.golden import compare_golden, unpack_golden
from pipeline.repository.profiles import PROFILES, Choice
from pipeline.repository.running import default_url
from pipeline.repository.settings import PackageConfig
from tests.conftest import Chain, error_line

TWO_CORES = PackageConfig(cores=2)
ON_CPU = [name for name in PROFILES if name not in profiles.ON_GPU]
# What ModelState::LoadModel of the native backend (onnxruntime.cc, from r24.04 on) takes for
# TensorRT, as far as somebody may want it; any other key fails the load.
TENSORRT_KEYS = {
    *("precision_mode", "max_workspace_size_bytes", "trt_max_partition_iterations"),
    *("trt_min_subgraph_size", "trt_engine_cache_enable", "trt_engine_cache_path"),
    *("trt_engine_cache_prefix", "trt_timing_cache_enable", "trt_timing_cache_path"),
    *("trt_builder_optimization_level", "trt_auxiliary_streams", "trt_sparsity_enable"),
    *("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"),
}
# And what it sets from `parameters`, over whatever the cuda block says.
OVERWRITTEN = {
    *("cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy"),
    "do_copy_in_default_stream",
}


@pytest.fixture
def base() -> config_pbtxt.ModelConfig:
    """What the configs of a model with two versions have in common."""
    outputs = log_probabilities(10)
    message = config_pbtxt.base_config("m", IMAGES, outputs, "0123456789", TWO_CORES)
    config_pbtxt.set_parameter(message, "sha256.1", "a" * 64)
    config_pbtxt.set_parameter(message, "sha256.2", "b" * 64)
    config_pbtxt.select(message, 2)
    return message


def value_of(
    field: str, profile: str, base: config_pbtxt.ModelConfig, config: PackageConfig = TWO_CORES
) -> Choice:
    (found,) = [one for one in profiles.explain(profile, base, config) if one.field == field]
    return found


def accelerators(message: config_pbtxt.ModelConfig) -> dict[str, dict[str, str]]:
    blocks = message.optimization.execution_accelerators.gpu_execution_accelerator
    return {block.name: dict(block.parameters) for block in blocks}


def leaves(message: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every field that a message sets, by its path; `parameters` and accelerators apart."""
    for descriptor, value in message.ListFields():
        path = prefix + descriptor.name
        if path in ("parameters", "optimization", "model_warmup.inputs", "model_warmup.name"):
            continue
        if descriptor.message_type is None:
            yield path, value if isinstance(value, int | str) else tuple(value)
        else:
            parts = [value] if hasattr(value, "ListFields") else value
            for part in parts:
                yield from leaves(part, f"{path}.")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_field_of_a_config_is_explained_with_its_value(
    profile: str, base: config_pbtxt.ModelConfig
) -> None:
    message = profiles.build_config(profile, base, TWO_CORES)
    explained = {one.field: str(one.value) for one in profiles.explain(profile, base, TWO_CORES)}
    assert all(one.reason for one in profiles.explain(profile, base, TWO_CORES))
    for key, parameter in message.parameters.items():
        assert explained.pop(f"parameters.{key}") == parameter.string_value
    for name, block in accelerators(message).items():
        for key, value in block.items():
            assert explained.pop(f"{name}.{key}") == value
    rungs = explained.pop("model_warmup.batch_size")
    assert rungs == str(tuple(rung.batch_size for rung in message.model_warmup))
    assert explained.pop("instance_group.kind") in config_pbtxt.to_text(message)
    paths = {path for path, _ in leaves(message)}
    for path, setting in leaves(message):
        if path in explained:
            assert explained[path] == str(setting)
    described = ("input.", "output.", "version_policy.", "model_warmup.", "instance_group.kind")
    unexplained = {path for path in paths if not path.startswith(described)} - explained.keys()
    assert not unexplained
    zero = {"dynamic_batching.max_queue_delay_microseconds"} if profile == "latency" else set()
    assert explained.keys() - paths - {"input", "output", "version_policy.specific"} == zero


def test_threads_and_instances_come_from_the_cores_with_their_arithmetic(
    base: config_pbtxt.ModelConfig,
) -> None:
    threads, count = "parameters.intra_op_thread_count", "instance_group.count"
    two, many = PackageConfig(cores=2), PackageConfig(cores=65)
    assert value_of(threads, "cpu", base, two).value == "2"
    assert value_of(threads, "cpu", base, two).reason == "2 cores / 1 instance = 2 threads"
    for profile in ("latency", "throughput"):
        assert value_of(count, profile, base, two).value == 2
        assert value_of(count, profile, base, two).reason.startswith("min(2 cores, 8) = 2: ")
        reason = value_of(threads, profile, base, two).reason
        assert reason == "2 cores / 2 instances = 1 thread"
        assert value_of(count, profile, base, many).value == 8
        reason = value_of(threads, profile, base, many).reason
        assert reason == "65 cores / 8 instances = 8 threads"
    assert value_of(threads, "config", base, many).value == "1"


@pytest.mark.parametrize("profile", ON_CPU)
def test_no_profile_derives_more_threads_than_there_are_cores(
    profile: str, base: config_pbtxt.ModelConfig
) -> None:
    for cores in range(1, 130):
        message = profiles.build_config(profile, base, PackageConfig(cores=cores))
        (group,) = message.instance_group
        threads = int(config_pbtxt.parameter(message, "intra_op_thread_count") or 0)
        assert 1 <= group.count * threads <= cores
        assert group.Kind.Name(group.kind) == "KIND_CPU"


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_asked_for_wins_in_every_profile_and_says_so(
    profile: str, base: config_pbtxt.ModelConfig
) -> None:
    config = PackageConfig(8, 7, 2, 3, 4, cores=2)
    for field, value in (
        ("max_batch_size", 8),
        ("dynamic_batching.max_queue_delay_microseconds", 7),
        ("instance_group.count", 2),
        ("parameters.intra_op_thread_count", "3"),
        ("parameters.inter_op_thread_count", "4"),
    ):
        choice = value_of(field, profile, base, config)
        assert choice.value == value
        assert choice.reason.startswith("asked for")
    if profile not in profiles.ON_GPU:
        crowded = value_of("parameters.intra_op_thread_count", profile, base, config)
        assert crowded.reason == "asked for; 2 x 3 = 6 threads share 2 cores"


@pytest.mark.parametrize(
    ("largest", "ladder"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])],
)
def test_the_warm_up_climbs_to_the_largest_batch_and_no_further(
    base: config_pbtxt.ModelConfig, largest: int, ladder: list[int]
) -> None:
    message = profiles.build_config("config", base, PackageConfig(largest))
    assert [rung.batch_size for rung in message.model_warmup] == ladder
    assert len({rung.name for rung in message.model_warmup}) == len(ladder)
    for rung in message.model_warmup:
        assert rung.inputs["images"].input_data_file == "digit"
        assert list(rung.inputs["images"].dims) == [1, 28, 28]


def test_latency_waits_for_nobody_and_throughput_prefers_full_batches(
    base: config_pbtxt.ModelConfig,
) -> None:
    waits = {
        name: profiles.build_config(name, base, TWO_CORES).dynamic_batching for name in PROFILES
    }
    assert waits["latency"].max_queue_delay_microseconds == 0
    assert profiles.build_config("latency", base, TWO_CORES).HasField("dynamic_batching")
    longest = max(waits, key=lambda name: waits[name].max_queue_delay_microseconds)
    assert longest == "throughput"
    assert list(waits["throughput"].preferred_batch_size) == [32, 64]
    alone = profiles.build_config("throughput", base, PackageConfig(1)).dynamic_batching
    assert not alone.preferred_batch_size


@pytest.mark.parametrize("profile", profiles.ON_GPU)
def test_a_gpu_profile_runs_on_gpus_with_tf32_off_and_without_a_search_for_each_shape(
    profile: str, base: config_pbtxt.ModelConfig
) -> None:
    message = profiles.build_config(profile, base, TWO_CORES)
    (group,) = message.instance_group
    assert group.Kind.Name(group.kind) == "KIND_GPU"
    cuda = accelerators(message)["cuda"]
    assert cuda["use_tf32"] == "0"
    assert not cuda.keys() & OVERWRITTEN
    assert config_pbtxt.parameter(message, "cudnn_conv_algo_search") == "1"


def test_tensorrt_gets_only_keys_that_the_native_backend_knows(
    base: config_pbtxt.ModelConfig,
) -> None:
    message = profiles.build_config("tensorrt-fp16", base, PackageConfig(32))
    blocks = accelerators(message)
    assert list(blocks) == ["tensorrt", "cuda"]  # what the first leaves, the second takes
    tensorrt = blocks["tensorrt"]
    assert tensorrt.keys() <= TENSORRT_KEYS
    assert tensorrt["precision_mode"] == "FP16"
    shapes = [tensorrt[f"trt_profile_{end}_shapes"] for end in ("min", "opt", "max")]
    assert shapes == ["images:1x1x28x28", "images:32x1x28x28", "images:32x1x28x28"]


def test_each_versions_engines_lie_apart(base: config_pbtxt.ModelConfig) -> None:
    message = profiles.build_config("tensorrt-fp16", base, TWO_CORES)
    before = accelerators(message)["tensorrt"][config_pbtxt.ENGINES]
    assert before == f"/tmp/tensorrt-{'b' * 16}"
    config_pbtxt.select(message, 1)
    assert config_pbtxt.selected(message) == [1]
    assert accelerators(message)["tensorrt"][config_pbtxt.ENGINES] == f"/tmp/tensorrt-{'a' * 16}"


def test_every_config_has_the_same_versions_and_config_pbtxt_is_written_last(
    base: config_pbtxt.ModelConfig, tmp_path: Path
) -> None:
    packaged = tmp_path / "m"
    own = packaged / "configs" / "mine.pbtxt"
    own.parent.mkdir(parents=True)
    own.write_text('name: "m" max_batch_size: 3 version_policy { specific { versions: 1 } }')
    profiles.write_configs(packaged, base, TWO_CORES)
    files = config_pbtxt.config_files(packaged)
    assert [file.stem for file in files] == [
        *sorted([*(set(PROFILES) - {"config"}), "mine"]),
        "config",
    ]
    for file in files:
        message = config_pbtxt.read(file)
        assert config_pbtxt.selected(message) == [2]
        assert (config_pbtxt.digest(message, "1"), config_pbtxt.digest(message, "2")) == (
            "a" * 64,
            "b" * 64,
        )
    assert config_pbtxt.read(own).max_batch_size == 3
    assert max(files, key=lambda file: file.stat().st_mtime_ns) == packaged / "config.pbtxt"
    assert config_pbtxt.profile_file(packaged) == packaged / "config.pbtxt"
    assert config_pbtxt.profile_file(packaged, "mine") == own
    with pytest.raises(
        PipelineError, match="has no profile 'fast'; its profiles: cpu, gpu, latency"
    ):
        config_pbtxt.profile_file(packaged, "fast")


def test_explain_says_each_field_and_packages_nothing(chain: Chain) -> None:
    result = chain.run("package", "--explain", "latency", "--cores", "4", "--instances", "2")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0].startswith("configs/latency.pbtxt, no request waits")
    assert "instance_group.count 2: asked for" in lines
    wanted = "parameters.intra_op_thread_count 2: 4 cores / 2 instances = 2 threads"
    assert wanted in lines
    everything = chain.run("package", "--explain").stdout
    assert everything.count("NVIDIA's native backend") == 1  # what all of them share is said once
    fields = chain.record("package", "--explain")["profiles"]
    assert list(fields) == list(PROFILES)
    assert {tuple(one) for found in fields.values() for one in found} == {
        ("field", "value", "reason")
    }
    wrong = chain.run("package", "--explain", "fast")
    assert wrong.exit_code == 2
    assert "no profile 'fast' exists: use config, cpu, gpu" in error_line(wrong)
    assert sorted(path.name for path in chain.paths.packaged.glob("[0-9]*")) == ["1"]


def test_what_explain_says_is_what_package_writes(chain: Chain) -> None:
    said = chain.record("package", "--explain", "cpu", "--cores", "3")["profiles"]["cpu"]
    assert chain.record("package", "--cores", "3")["version"] == 2
    written = config_pbtxt.read(chain.paths.packaged / "configs" / "cpu.pbtxt")
    values = {one["field"]: one["value"] for one in said}
    assert values["version_policy.specific"] == config_pbtxt.selected(written)[0] == 2
    assert values["parameters.intra_op_thread_count"] == "3"
    for key, parameter in written.parameters.items():
        assert values[f"parameters.{key}"] == parameter.string_value


def test_a_profile_that_the_repository_has_not_is_not_served(chain: Chain) -> None:
    result = chain.run("serve", "--profile", "fast")
    assert result.exit_code == 1
    assert "has no profile 'fast'; its profiles: cpu, gpu, latency, tensorrt-fp16" in error_line(
        result
    )


@pytest.mark.server
@pytest.mark.parametrize("profile", ["cpu", "throughput"])
def test_a_profile_is_served_warm_and_answers_rightly(servable: Chain, profile: str) -> None:
    # Ready means: right on the golden set over both protocols.
    servable.record("serve", "--detach", "--port", "auto", "--profile", profile)
    expected = config_pbtxt.read(config_pbtxt.profile_file(servable.paths.packaged, profile))
    url = default_url(servable.paths)
    with Client(url) as client:
        config = client.config()
    waits = config.dynamic_batching.max_queue_delay_microseconds
    assert waits == expected.dynamic_batching.max_queue_delay_microseconds
    assert config.instance_group[0].count == expected.instance_group[0].count
    with grpc.InferenceServerClient(url.removeprefix("grpc://")) as plain:
        (model,) = plain.get_inference_statistics("handwriting").model_stats
    ran = {batch.batch_size: batch.compute_infer.count for batch in model.batch_stats}
    for size in (4, 8, 16, 32, 64):  # the golden set is asked in others
        assert ran[size] == expected.instance_group[0].count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_profiles_settings_give_the_golden_answers(
    made: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.export import runtime

    message = config_pbtxt.read(config_pbtxt.profile_file(made.paths.packaged, "gpu"))
    options = {**accelerators(message)["cuda"], "cudnn_conv_algo_search": "HEURISTIC"}
    providers = [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
    monkeypatch.setitem(runtime.PROVIDERS, "cuda", providers)
    predictor = runtime.onnx_predictor(made.paths.onnx.read_bytes(), provider="cuda")
    golden = unpack_golden(made.paths.golden.read_bytes(), "golden.npz")
    sizes = tuple(rung.batch_size for rung in message.model_warmup)
    assert not compare_golden(golden, predictor, sizes)


def test_a_table_of_one_profile_has_all_of_it(base: config_pbtxt.ModelConfig) -> None:
    text = profiles.format_profiles({"cpu": profiles.explain("cpu", base, TWO_CORES)})
    assert text.splitlines()[0] == f"configs/cpu.pbtxt, {PROFILES['cpu']}:"
    assert "m: the folder's name" in text
    assert f"{'b' * 36}..." in text  # JSON has it whole
