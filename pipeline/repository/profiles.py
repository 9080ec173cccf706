"""The configs of a packaged model, with a reason for each field.

Each choice is made once: both the written configs and the output of `--explain` come from it.
For what the fields do, see Triton's sources: core's src/model_config_utils.cc and
src/dynamic_batch_scheduler.cc, and ModelState::LoadModel in the native backend's onnxruntime.cc.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import machine
from pipeline.core.text import Lines, format_count
from pipeline.repository import config_pbtxt
from pipeline.repository.config_pbtxt import ModelConfig
from pipeline.repository.settings import PackageConfig

# The configs of a packaged model: config.pbtxt, and the others, chosen by --model-config-name.
PROFILES = {
    "config": "runs on any machine and uses one core",
    "cpu": "one batch at a time, on all cores",
    "gpu": "CUDA, in float32 as on the CPU",
    "latency": "no request waits for another one's batch or answer",
    "tensorrt-fp16": "TensorRT in float16, with a cached engine",
    "throughput": "large batches: a request waits until its batch is full or its delay is over",
}
ASKED = "asked for"
ON_GPU = ("gpu", "tensorrt-fp16")
SIDE_BY_SIDE = ("latency", "throughput")  # several sessions, one for each core
MOST_INSTANCES = 8  # unless --instances says more: each has its own copy of the weights
DELAY_US, LONG_DELAY_US = 500, 2000  # microseconds that a request waits for its batch
LONG = 36  # characters of a value that are shown, at most


@dataclass(frozen=True)
class Choice:
    """A field of a config, its value, and the reason for the value."""

    field: str  # path as in config.pbtxt; for a GPU accelerator, its name and the key
    value: config_pbtxt.Value
    reason: str

    @property
    def short_value(self) -> str:
        """The value as one line of text, cut to LONG characters."""
        parts = self.value if isinstance(self.value, tuple) else (self.value,)
        text = ", ".join(map(str, parts))
        return text if len(text) <= LONG else f"{text[:LONG]}..."


def explain(profile: str, base: ModelConfig, config: PackageConfig) -> list[Choice]:
    """Return every field of a profile's config: those of all profiles first, then its own."""
    images, outputs = base.input[0], base.output[0]
    common = [
        Choice("name", base.name, "the folder's name, as Triton requires"),
        Choice("backend", base.backend, "NVIDIA's native backend, or ours of the same name"),
    ]
    for role, tensor in (("input", images), ("output", outputs)):
        described = f"{tensor.name} {config_pbtxt.dtype(tensor)} {list(tensor.dims)}"
        common.append(Choice(role, described, "as in the graph, without the batch dimension"))
    if labels := outputs.label_filename:
        common.append(Choice("output.label_filename", labels, "names of the classes"))
    for version in config_pbtxt.selected(base):
        policy = "the version that a server loads; 'pipeline versions' changes it"
        common.append(Choice("version_policy.specific", version, policy))
    reasons = {
        "sha256": "of that version's model.onnx; 'pipeline serve' checks it, Triton does not",
        "classes": "the class names, for clients that read the config",
        "pictures": "how clients make images from picture files",
        "outputs": "what the numbers are, for clients",
    }
    for key, value in sorted(base.parameters.items()):
        reason = reasons.get(key.partition(".")[0], "the pipeline reads it, Triton does not")
        common.append(Choice(f"parameters.{key}", value.string_value, reason))
    return [*common, *choices(profile, base, config)]


def format_profiles(explained: Mapping[str, list[Choice]]) -> str:
    """Format the choices of some profiles as text, those that all of them share first."""
    first, *others = explained.values()
    shared = [choice for choice in first if all(choice in other for other in others)]
    parts = {"every config below": shared} if others else {}
    for name, choices in explained.items():
        file = "config.pbtxt" if name == "config" else f"{config_pbtxt.PROFILES}/{name}.pbtxt"
        own = [choice for choice in choices if not others or choice not in shared]
        parts[f"{file}, {PROFILES[name]}"] = own
    width = max(len(choice.field) for part in parts.values() for choice in part)
    lines = []
    for title, part in parts.items():
        lines.append(f"{title}:")
        lines += [f"  {c.field:<{width}}  {c.short_value}: {c.reason}" for c in part]
    return Lines(*lines)


def build_config(profile: str, base: ModelConfig, config: PackageConfig) -> ModelConfig:
    """Return a profile's config: `base`, with versions and digests, plus the profile's choices."""
    message = ModelConfig()
    message.CopyFrom(base)
    for choice in choices(profile, base, config):
        config_pbtxt.set_field(message, choice.field, choice.value)
    return message


def write_configs(packaged: Path, base: ModelConfig, config: PackageConfig) -> None:
    """Write every profile's config, config.pbtxt last; update the versions in users' profiles."""
    folder = packaged / config_pbtxt.PROFILES
    for path in config_pbtxt.config_files(packaged)[:-1]:
        if path.stem not in PROFILES:  # a user's: update only the versions and parameters
            message = config_pbtxt.read(path)
            for key, value in base.parameters.items():
                config_pbtxt.set_parameter(message, key, value.string_value)
            message.version_policy.CopyFrom(base.version_policy)
            config_pbtxt.save(path, message)
    for name in sorted(PROFILES, key=lambda name: name == "config"):
        path = packaged / config_pbtxt.CONFIG if name == "config" else folder / f"{name}.pbtxt"
        config_pbtxt.save(path, build_config(name, base, config))


def choices(profile: str, base: ModelConfig, config: PackageConfig) -> list[Choice]:
    """Return a profile's choices, from the options, the machine's cores and the model's input."""
    cores, is_on_gpu = config.cores or machine.cores(), profile in ON_GPU
    kind = ("KIND_CPU", "every machine has one")
    instances, reason = 1, "one session runs whole batches; Triton's default on a CPU is two"
    if is_on_gpu:
        kind = ("KIND_GPU", "uses every GPU; on a machine without one, the load fails")
        reason = "one session for each GPU: batches fill it, and a second one needs its own memory"
    elif profile in SIDE_BY_SIDE:
        instances = min(cores, MOST_INSTANCES)
        limit = f"min({format_count(cores, 'core')}, {MOST_INSTANCES}) = {instances}"
        reason = f"{limit}: threads of one session wait for each other, sessions do not"
    if config.instances:
        instances, reason = config.instances, ASKED
    largest = config.max_batch_size
    ladder = (*(2**step for step in range(largest.bit_length()) if 2**step < largest), largest)
    warmup = f"{sum(ladder)} images run before the first request, so that no request waits for "
    warmup += "memory or, on a GPU, for the choice of an algorithm"
    tf32 = "float32 as in PyTorch; else rounded to 10 bits on a GPU (Triton 24.06 or later)"
    # Set under parameters: in the cuda block the native backend overwrites it with its default.
    search = "heuristic: the default searches again for each batch size, and depends on timing"
    return [
        *_set_batching(profile, config),
        Choice("instance_group.kind", *kind),
        Choice("instance_group.count", instances, reason),
        *_set_threads(profile, cores, instances, config),
        *([Choice("parameters.cudnn_conv_algo_search", "1", search)] if is_on_gpu else ()),
        *(_set_tensorrt(base, config) if profile == "tensorrt-fp16" else ()),
        Choice("cuda.use_tf32", "0", tf32 if is_on_gpu else f"{tf32}; not read on a CPU"),
        Choice("model_warmup.batch_size", ladder, warmup),
    ]


def _set_batching(profile: str, config: PackageConfig) -> list[Choice]:
    largest, reason = config.max_batch_size, "the validation covered larger batches"
    if largest != PackageConfig.max_batch_size:
        reason = f"{ASKED}; {reason}"
    delay, why = DELAY_US, "the most that a request waits for others to share its batch"
    if profile == "latency":
        delay, why = 0, "no wait: requests that are queued when a session is free run together"
    elif profile == "throughput":
        delay, why = LONG_DELAY_US, f"4 x {DELAY_US}: the most that a batch waits to become full"
    if config.max_queue_delay_us is not None:
        delay, why = config.max_queue_delay_us, ASKED
    batching = [
        Choice("max_batch_size", largest, reason),
        Choice("dynamic_batching.max_queue_delay_microseconds", delay, why),
    ]
    if profile == "throughput" and largest > 1:
        sizes = (largest // 2, largest)
        why = f"a batch of one of these sizes runs without waiting: {largest} / 2 = {largest // 2}"
        batching.append(Choice("dynamic_batching.preferred_batch_size", sizes, why))
    return batching


def _set_threads(profile: str, cores: int, instances: int, config: PackageConfig) -> list[Choice]:
    threads, reason = 1, "one core; the other cores are free for other programs"
    if profile in ON_GPU:
        reason = "the GPU computes; one thread gives it its work"
    elif profile in ("cpu", *SIDE_BY_SIDE):
        threads = max(1, cores // instances)
        reason = f"{format_count(cores, 'core')} / {format_count(instances, 'instance')} = "
        reason += format_count(threads, "thread")
    if config.intra_op_threads:
        threads, reason = config.intra_op_threads, ASKED
    if profile not in ON_GPU and threads * instances > cores:
        total = f"{instances} x {threads} = {format_count(instances * threads, 'thread')}"
        reason += f"; {total} share {format_count(cores, 'core')}"
    between, unused = config.inter_op_threads, "not used: operators run one after the other"
    why = f"{ASKED}; {unused}" if between else unused
    return [
        Choice("parameters.intra_op_thread_count", str(threads), reason),
        Choice("parameters.inter_op_thread_count", str(between or 1), why),
    ]


def _set_tensorrt(base: ModelConfig, config: PackageConfig) -> list[Choice]:
    """Return TensorRT's choices, with no key that the native backend does not know.

    Triton refuses to load a model with any other key.
    """
    images, largest = base.input[0], config.max_batch_size
    options = {
        "precision_mode": ("FP16", "for the fp16 variant: an fp32 file would fail its golden set"),
        "max_workspace_size_bytes": (str(1 << 30), "1 GiB: a limit while the engine is built"),
        "trt_engine_cache_enable": ("1", "a build takes minutes; the engine is for this GPU only"),
        config_pbtxt.ENGINES: (
            config_pbtxt.engine_folder(base),
            "writable in a read-only container too (mount a volume there to keep engines); one for "
            "each digest, because ONNX Runtime does not tell engines of other weights apart",
        ),
    }
    for end, size, reason in (
        ("min", 1, "with all three shapes, one engine serves every batch size from 1"),
        ("opt", largest, "the size at which the engine is fastest: a full batch"),
        ("max", largest, "max_batch_size; without the shapes, each new size builds an engine"),
    ):
        shape = "x".join(map(str, (size, *images.dims)))
        options[f"trt_profile_{end}_shapes"] = (f"{images.name}:{shape}", reason)
    return [Choice(f"tensorrt.{key}", value, why) for key, (value, why) in options.items()]
