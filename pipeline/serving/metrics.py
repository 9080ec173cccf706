"""What a running tritonserver counts, from its Prometheus endpoint."""

import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from pipeline.core.errors import ServerError

# Counters of each model and version, and a summary of the last minute's latencies.
REQUESTS = "nv_inference_request_success"
FAILURES = "nv_inference_request_failure"
IMAGES = "nv_inference_count"
BATCHES = "nv_inference_exec_count"
LATENCY = "nv_inference_request_summary_us"


@dataclass(frozen=True)
class Load:
    """What a version of a model has done since its server started, our canary included."""

    requests: int  # that were answered
    failures: int
    mean_batch: float | None  # images that ran together, on average; None before the first
    p50_us: float | None  # of a request in the server, over the last minute; None without any
    p99_us: float | None


Samples = dict[tuple[str, str], dict[str, float]]  # of a model's version, by series and quantile


def loads(url: str, seconds: float = 2.0) -> dict[tuple[str, str], Load]:
    """The load of each version, by name and version, from the metrics at `url`.

    Raises ServerError when no answer comes in `seconds`.
    """
    return {model: _load(values) for model, values in _samples(_text(url, seconds)).items()}


def _text(url: str, seconds: float) -> str:
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            text: str = response.read().decode()
            return text
    except OSError as error:
        raise ServerError(f"no metrics from {url} ({error})") from error


def _samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "model" in sample.labels and sample.value == sample.value:  # a quantile of none: NaN
                model = sample.labels["model"], sample.labels["version"]
                series = sample.name.removesuffix("_total") + sample.labels.get("quantile", "")
                values = found.setdefault(model, {})
                values[series] = values.get(series, 0.0) + sample.value  # failures: by reason
    return found


def _load(values: dict[str, float]) -> Load:
    batches = values.get(BATCHES, 0.0)
    return Load(
        requests=int(values.get(REQUESTS, 0)),
        failures=int(values.get(FAILURES, 0)),
        mean_batch=values.get(IMAGES, 0.0) / batches if batches else None,
        p50_us=values.get(f"{LATENCY}0.5"),
        p99_us=values.get(f"{LATENCY}0.99"),
    )
