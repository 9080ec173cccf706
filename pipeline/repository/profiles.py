"""The configs of a packaged model, with a reason for each field.

Each choice is made once: both the written configs and the output of `--explain` come from it.
For what the fields do, see Triton's sources: core's src/model_config_utils.cc and
src/dynamic_batch_scheduler.cc, and ModelState::LoadModel in the native backend's onnxruntime.cc.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import machine
from pipeline.core.text import Lines
from pipeline.repository import config_pbtxt
from pipeline.repository.settings import PackageConfig

# The configs of a packaged model: config.pbtxt, and the others, chosen by --model-config-name.
PROFILES = {
    "config": "runs anywhere and loads a machine little",
    "cpu": "a batch at a time, on every core",
    "gpu": "CUDA, in float32 as on the CPU",
    "latency": "no request waits for company, nor for another's answer",
    "tensorrt-fp16": "TensorRT in float16, its engine built once",
    "throughput": "large batches: a request waits until one is full, or its time is up",
}
ASKED = "asked for"
ON_GPU = ("gpu", "tensorrt-fp16")
SIDE_BY_SIDE = ("latency", "throughput")  # several sessions, one for each core
MOST_INSTANCES = 8  # unless --instances says more: each has its own copy of the weights
DELAY_US, LONG_DELAY_US = 500, 2000
WORKSPACE = 1 << 30  # bytes
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


def explain(profile: str, base: config_pbtxt.ModelConfig, config: PackageConfig) -> list[Choice]:
    """Return every field of a profile's config: those of all profiles first, then its own."""
    images, outputs = base.input[0], base.output[0]
    graph = "as in the graph, where the batch comes first and is not listed here"
    common = [
        Choice("name", base.name, "the folder's name: Triton compares them"),
        Choice("backend", base.backend, "NVIDIA's native one, or ours of the same name"),
    ]
    for role, tensor in (("input", images), ("output", outputs)):
        dims = ", ".join(map(str, tensor.dims))
        common.append(Choice(role, f"{tensor.name} {config_pbtxt.dtype(tensor)} [{dims}]", graph))
    labels = "class names, for Triton's classification extension"
    common.append(Choice("output.label_filename", outputs.label_filename, labels))
    for version in config_pbtxt.selected(base):
        policy = "the version that a server takes; 'pipeline versions' changes it"
        common.append(Choice("version_policy.specific", version, policy))
    reasons = {
        "sha256": "of that version's model.onnx; no server reads it, 'pipeline serve' does",
        "classes": "the same names for clients that read the config",
        "pictures": "how clients make images of picture files",
        "outputs": "what the numbers are, for clients",
    }
    for key in sorted(base.parameters):
        why = reasons.get(key.partition(".")[0], "no server reads it; the pipeline does")
        common.append(Choice(f"parameters.{key}", base.parameters[key].string_value, why))
    return [*common, *choices(profile, base, config)]


def format_profiles(explained: Mapping[str, list[Choice]]) -> str:
    """Format the choices of some profiles as text, those that all of them share first."""
    first, *others = explained.values()
    shared = [choice for choice in first if all(choice in other for other in others)]
    own = {key: [one for one in every if one not in shared] for key, every in explained.items()}
    parts = {"every config below": shared, **own} if others else explained
    width = max(len(choice.field) for part in parts.values() for choice in part)
    lines = []
    for name, part in parts.items():
        title = name
        if name in PROFILES:
            file = "config.pbtxt" if name == "config" else f"{config_pbtxt.PROFILES}/{name}.pbtxt"
            title = f"{file}, {PROFILES[name]}"
        lines.append(f"{title}:")
        lines += [f"  {one.field:<{width}}  {one.short_value}: {one.reason}" for one in part]
    return Lines(*lines)


def message_of(
    profile: str, base: config_pbtxt.ModelConfig, config: PackageConfig
) -> config_pbtxt.ModelConfig:
    """Return a profile's config: `base`, with versions and digests, plus the profile's choices."""
    message = config_pbtxt.ModelConfig()
    message.CopyFrom(base)
    for choice in choices(profile, base, config):
        config_pbtxt.put(message, choice.field, choice.value)
    return message


def write_configs(packaged: Path, base: config_pbtxt.ModelConfig, config: PackageConfig) -> None:
    """Write every profile's config, config.pbtxt last; update the versions in users' profiles."""
    folder = packaged / config_pbtxt.PROFILES
    for path in config_pbtxt.config_files(packaged)[:-1]:
        if path.stem not in PROFILES:  # a user's: update only the versions and parameters
            message = config_pbtxt.read(path)
            for key in base.parameters:
                config_pbtxt.set_parameter(message, key, base.parameters[key].string_value)
            message.version_policy.CopyFrom(base.version_policy)
            config_pbtxt.save(path, message)
    for name in sorted(PROFILES, key=lambda name: name == "config"):
        path = packaged / config_pbtxt.CONFIG if name == "config" else folder / f"{name}.pbtxt"
        config_pbtxt.save(path, message_of(name, base, config))


def choices(profile: str, base: config_pbtxt.ModelConfig, config: PackageConfig) -> list[Choice]:
    """Return a profile's choices, from the options, the machine's cores and the model's input."""
    cores, is_on_gpu = config.cores or machine.cores(), profile in ON_GPU
    kind = ("KIND_CPU", "needs nothing that a machine may lack")
    instances, why = (
        1,
        "one session takes whole batches; without a count Triton starts two on a CPU",
    )
    if is_on_gpu:
        kind = ("KIND_GPU", "else no GPU is used; where there is none the load fails")
        why = "one session on each GPU: batches fill it, and a second one needs its own memory"
    elif profile in SIDE_BY_SIDE:
        instances = min(cores, MOST_INSTANCES)
        why = f"min({_count(cores, 'core')}, {MOST_INSTANCES}) = {instances}: "
        why += "threads of one session wait for each other, sessions do not"
    if config.instances:
        instances, why = config.instances, ASKED
    largest = config.max_batch_size
    ladder = (*(2**step for step in range(largest.bit_length()) if 2**step < largest), largest)
    images = " + ".join(map(str, ladder)) if len(ladder) < 4 else f"1 + 2 + ... + {largest}"
    # Set under parameters: in the cuda block the native backend overwrites it with its default.
    search = Choice(
        "parameters.cudnn_conv_algo_search",
        "1",
        "heuristic: the usual exhaustive search is run anew for each batch size that comes, not "
        "just for the warm-up's, and picks by the clock",
    )
    return [
        *_batching(profile, config),
        Choice("instance_group.kind", *kind),
        Choice("instance_group.count", instances, why),
        *_threads(profile, cores, instances, config),
        *([search] if is_on_gpu else ()),
        *(_tensorrt(base, config) if profile == "tensorrt-fp16" else ()),
        Choice(
            "cuda.use_tf32",
            "0",
            "ONNX Runtime's default rounds float32 to 10 bits on a GPU, PyTorch's does not; Triton "
            "24.06 and later know it" + ("" if is_on_gpu else "; not read on a CPU"),
        ),
        Choice(
            "model_warmup.batch_size",
            ladder,
            f"each doubles; {images} = {sum(ladder)} runs of a real image before the first request"
            ", so that none waits for memory or, on a GPU, for the choice of an algorithm",
        ),
    ]


def _batching(profile: str, config: PackageConfig) -> list[Choice]:
    largest, tried = config.max_batch_size, "the proof has tried larger batches than this"
    if largest != PackageConfig.max_batch_size:
        tried = f"{ASKED}; {tried}"
    delay, why = DELAY_US, "half a millisecond for company, which a lone request waits for in vain"
    if profile == "latency":
        delay, why = 0, "no wait: what is queued when a session is free runs together"
    elif profile == "throughput":
        delay, why = LONG_DELAY_US, f"4 x {DELAY_US}: what a batch may wait to become full"
    if config.max_queue_delay_us is not None:
        delay, why = config.max_queue_delay_us, ASKED
    batching = [
        Choice("max_batch_size", largest, tried),
        Choice("dynamic_batching.max_queue_delay_microseconds", delay, why),
    ]
    if profile == "throughput" and largest > 1:
        sizes, halves = (largest // 2, largest), f"{largest} / 2 = {largest // 2}"
        why = f"a batch of one of these sizes leaves at once, full or half full: {halves}"
        batching.append(Choice("dynamic_batching.preferred_batch_size", sizes, why))
    return batching


def _threads(profile: str, cores: int, instances: int, config: PackageConfig) -> list[Choice]:
    threads, why = 1, "a single core; the rest of the machine is somebody else's"
    if profile in ON_GPU:
        why = "the GPU computes; one thread hands it its work"
    elif profile in ("cpu", *SIDE_BY_SIDE):
        threads = max(1, cores // instances)
        why = f"{_count(cores, 'core')} / {_count(instances, 'instance')} = {threads}"
        why += " thread" if threads == 1 else " threads"
    if config.intra_op_threads:
        threads, why = config.intra_op_threads, ASKED
    if profile not in ON_GPU and threads * instances > cores:
        together = f"{instances} x {threads} = {_count(instances * threads, 'thread')}"
        why += f"; {together} share {_count(cores, 'core')}"
    between = "operators run one after the other (execution_mode 0), and this is not read"
    return [
        Choice("parameters.intra_op_thread_count", str(threads), why),
        Choice(
            "parameters.inter_op_thread_count",
            str(config.inter_op_threads or 1),
            f"{ASKED}; {between}" if config.inter_op_threads else between,
        ),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _tensorrt(base: config_pbtxt.ModelConfig, config: PackageConfig) -> list[Choice]:
    """Return TensorRT's choices; only keys that the native backend knows, others fail the load."""
    images, largest = base.input[0], config.max_batch_size
    shape = "".join(f"x{dim}" for dim in images.dims)
    reasons = {
        "precision_mode": (
            "FP16",
            "float16: an fp32 file's golden set refuses such answers, so this is for the fp16 "
            "variant (pipeline export --precision fp16)",
        ),
        "max_workspace_size_bytes": (str(WORKSPACE), "1024 x 1024 x 1024: a bound while it builds"),
        "trt_engine_cache_enable": ("1", "building takes minutes, and is for this GPU only"),
        config_pbtxt.ENGINES: (
            config_pbtxt.engine_folder(base),
            "/tmp can be written in a read-only container too (mount a volume there to keep "
            "engines); named by digest, for ONNX Runtime mistakes engines of other weights for its",
        ),
        "trt_profile_min_shapes": (
            f"{images.name}:1{shape}",
            "with all three given, one engine serves every batch size from 1",
        ),
        "trt_profile_opt_shapes": (
            f"{images.name}:{largest}{shape}",
            "the size to be fast at: a full batch, as under load",
        ),
        "trt_profile_max_shapes": (
            f"{images.name}:{largest}{shape}",
            f"to {largest}, max_batch_size; without them each new size builds anew",
        ),
    }
    return [Choice(f"tensorrt.{key}", value, why) for key, (value, why) in reasons.items()]
