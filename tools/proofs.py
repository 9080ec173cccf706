"""What the README says of the proofs under load, each from the result file of its command."""

from collections.abc import Callable
from typing import Any

MEBIBYTE = 1024 * 1024
YARDSTICK = "yardstick"  # a row that tells of the machine, not of a model


def _when(figure: dict[str, Any]) -> str:
    return f"`{figure['command']}` on {figure['measured_at'][:10]}"


def swap_markdown(figure: dict[str, Any]) -> str:
    """A sentence about the versions that were changed while clients asked."""
    return (
        f"{_when(figure)}: {figure['promotes']} promotes and rollbacks under "
        f"{figure['requests']:,} requests of {len(figure['clients'])} clients over HTTP and gRPC, "
        f"every answer held against its own image: {figure['failed']} failed, {figure['wrong']} "
        f"wrong, the slowest took {figure['slowest_request_seconds']:.2f} s."
    )


def kill_markdown(figure: dict[str, Any]) -> str:
    """A sentence about the kills and drains of a server while clients asked."""
    kills, drains = figure["kills"], figure["drains"]
    longest = ", ".join(f"{kind} {found['longest']:.1f} s" for kind, found in kills.items())
    return (
        f"{_when(figure)}, under {figure['requests']:,} requests: "
        f"{sum(found['times'] for found in kills.values())} kills, right answers for every client "
        f"again after at most: {longest}; {drains['times']} drains in at most "
        f"{drains['longest']:.1f} s with {drains['lost']} accepted requests lost; "
        f"{figure['wrong']} wrong answers, {len(figure['left_behind'])} processes or regions of "
        "shared memory left behind."
    )


def soak_markdown(figure: dict[str, Any]) -> str:
    """A sentence about a server's size."""
    return (
        f"{_when(figure)}: {figure['requests']:,} requests, {figure['failed'] + figure['wrong']} "
        f"not right; the server grew by {figure['grown_bytes'] / MEBIBYTE:.1f} MiB."
    )


def lint_markdown(figure: dict[str, Any]) -> str:
    """A sentence about what lint makes of mutated repositories."""
    corpus = figure["corpus"]
    return (
        f"{_when(figure)}: {figure['mutations']} mutations of a repository and {figure['sound']} "
        f"sound variations, held against a real Triton: {figure['faults']} not as expected. Of the "
        f"{corpus['sound']:,} models of ONNX's own tests that ONNX Runtime loads, "
        f"{corpus['refused_though_sound']} are refused. The table: `tools/results/lint.json`."
    )


def _milliseconds(latency: dict[str, float], percentile: str) -> str:
    return f"{latency[percentile]:.1f} ms" if percentile in latency else "too few"


def serving_markdown(figure: dict[str, Any]) -> str:
    """The README's table of a served model's speed."""
    lines = [
        "| | images a request | at once | images/s, median (least to most) | p50 | p99 |",
        "|--|--|--|--|--|--|",
    ]
    for row in figure["rows"]:
        if row["name"] == YARDSTICK:
            continue
        speed, latency = row["images_per_second"], row["latency_ms"]
        at_once = f"open loop, {row['rate']:,.0f}/s" if row.get("rate") else row["concurrency"]
        lines.append(
            f"| {row['name']}, {row['way']} | {row['batch']} | {at_once} | "
            f"{speed['median']:,.0f} ({speed['min']:,.0f} to {speed['max']:,.0f}) | "
            f"{_milliseconds(latency, 'p50')} | {_milliseconds(latency, 'p99')} |"
        )
    ratios, host = figure["ratios"], figure["machine"]
    lines += [
        "",
        f"{_when(figure)}, {host['processor']} with {host['cores']} cores that server and clients "
        f"share, all in one run: single images come at {ratios['single_of_noop']:.2f} of the rate "
        "of a model that computes nothing on the same server; batches of 64, under the throughput "
        f"profile, at {ratios['batch64_of_in_process']:.2f} of ONNX Runtime's in process with as "
        f"many threads ({figure['threads']}).",
    ]
    return "\n".join(lines)


def compare_markdown(figure: dict[str, Any]) -> str:
    """A sentence about what a comparison finds, and what it does not make up."""
    slow, wrong, alike = figure["slowdown"], figure["loss"], figure["same"]
    largest = min(slow["worse"], key=lambda change: float(change["change"]))
    lost = min(wrong["worse"], key=lambda change: float(change["change"]))
    return (
        f"{_when(figure)}: a backend that takes {figure['share']:.0%} longer is found in "
        f"{len(slow['worse'])} rows (at most {-largest['change']:.0%} slower: {largest['row']}), "
        f"weights that lose {-lost['change']:.2%} of the test images in {len(wrong['worse'])}; "
        f"{len(alike)} comparisons in a row of the same with the same raised "
        f"{sum(one['exit'] != 0 for one in alike)} alarms."
    )


def photos_markdown(figure: dict[str, Any]) -> str:
    """The README's table of pictures that people have."""
    lines = ["| pictures | accuracy | mean confidence | calibration error |", "|--|--|--|--|"]
    for row in (*figure["rows"], figure["tuned"], figure["held_back"], figure["total"]):
        held = " (held back)" if row["name"] in figure["held_back_names"] else ""
        lines.append(
            f"| {row['name']}{held} | {row['accuracy']:.1%} | {row['confidence']:.1%} | "
            f"{row['calibration_error']:.3f} |"
        )
    lines += [
        "",
        f"{_when(figure)}: {figure['config']['digits']} test digits of MNIST in each row, drawn "
        "into pictures that the model never saw. No rule was changed for the rows held back, "
        "whose pictures nobody looked at.",
    ]
    return "\n".join(lines)


def unsure_markdown(figure: dict[str, Any]) -> str:
    """The README's table of what a model is not sure of."""
    lines = ['| what it is shown | images | "not sure" |', "|--|--|--|"]
    parts = [figure[name] for name in ("digits", "right", "wrong")]
    shares = []
    for row in (*figure["rows"], *parts):
        shares.append(row["refused"] / max(1, row["images"]))
        lines.append(f"| {row['name']} | {row['images']:,} | {shares[-1]:.2%} |")
    *_, right, wrong = shares
    lines += [
        "",
        f"{_when(figure)}: {figure['share']:.1%} of what is no digit is refused (the mean of its "
        "kinds; signs, and letters that may be digits, are not among them). Wrong answers are "
        f"refused {wrong / max(right, 1e-9):,.0f} times as often as right ones. Refused is an "
        f"answer whose probability is below {figure['min_probability']:g}, which was fitted "
        "on the validation split of the digits alone. No choice was made by the rows held back.",
    ]
    return "\n".join(lines)


LOCKOUTS = {
    "unread": "sent requests and read no answer",
    "trickled": "sent pictures a byte at a time",
}


def gateway_markdown(figure: dict[str, Any]) -> str:
    """A sentence about everything wrong that was sent to the page's gateway."""
    crowd = figure["crowd"]
    return (
        f"{_when(figure)}: {figure['requests']:,} fuzzed requests and {figure['pictures']:,} "
        "damaged pictures, no crash, nothing above 499 but 503, and right answers in between; "
        f"{figure['bombs']} image bombs refused with {figure['bomb_bytes'] / MEBIBYTE:.1f} MiB; "
        f"{figure['attempts']} requests of other sites and of rebound names refused. "
        f"{crowd['users']} users at once for {crowd['seconds']:g} s: {crowd['right']:,} answers, "
        f"{crowd.get('wrong', 0)} of them wrong, {crowd.get('refused', 0):,} times 503 with "
        f"Retry-After, and {crowd['grown_bytes'] / MEBIBYTE:.0f} MiB more memory."
        + "".join(
            f" While one address opened {lockout['connections']} connections and "
            f"{LOCKOUTS[kind]}, for {lockout['seconds']:g} s: {lockout['right']:,} answers to "
            f"others, {lockout.get('wrong', 0)} of them wrong, {lockout.get('refused', 0)} times "
            f"503, the longest wait {lockout['longest_seconds']:.1f} s; what it held came free "
            f"after {lockout['free_seconds']:.0f} s."
            for kind, lockout in figure.get("lockouts", {}).items()
        )
    )


def score_markdown(figure: dict[str, Any]) -> str:
    """A sentence about the images that were scored offline."""
    host, is_same = figure["machine"], figure["killed"] == figure["uninterrupted"]
    fewer, peak = (figure[name] / MEBIBYTE for name in ("fewer_peak_bytes", "peak_bytes"))
    return (
        f"{_when(figure)}, {host['processor']} with {host['cores']} cores: {figure['images']:,} "
        f"images at {figure['rate']:,.0f}/s (Ray's start, {figure['start_seconds']:.0f} s, left "
        f"out), {figure['ratio']:.0%} of the best rate of ONNX Runtime in process with a thread "
        f"for each core, measured before and after. All processes together held at most "
        f"{peak:,.0f} MiB, and {fewer:,.0f} MiB with {figure['fewer_images']:,} images. Killed "
        f"{len(figure['kills'])} times, all its processes at once, and started again: "
        f"{figure['killed']['rows']:,} rows, {'the same' if is_same else 'NOT the same'} ids and "
        "answers as a run that was left alone."
    )


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "swap": swap_markdown,
    "kill": kill_markdown,
    "soak": soak_markdown,
    "lint": lint_markdown,
    "score": score_markdown,
    "compare": compare_markdown,
    "serving": serving_markdown,
    "gateway": gateway_markdown,
    "photos": photos_markdown,
    "unsure": unsure_markdown,
}
COMMANDS = {
    "swap": "make prove-swap",
    "kill": "make prove-kill",
    "soak": "make prove-soak",
    "lint": "make prove-lint",
    "score": "make prove-score",
    "compare": "make prove-compare",
    "serving": "make prove-serving",
    "gateway": "make prove-gateway",
    "photos": "make prove-photos",
    "unsure": "make prove-unsure",
}
MISSING = {name: f"*Not proven yet*: `{command}`." for name, command in COMMANDS.items()}
