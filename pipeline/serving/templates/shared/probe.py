"""Exit 0 when a Triton knows an image: probe.py URL IMAGE CLASS TYPE. Otherwise 1, and why.

Health endpoints stay green while every inference fails, so a health check has to infer. Runs
inside NVIDIA's container, with nothing but Python.
"""

import http.client
import struct
import sys
import urllib.parse

SECONDS = 4.0  # below the time-out of whoever runs this


def is_ahead(values: list[float], expected: int) -> bool:
    """Whether that class is ahead of all others: of equal values none is, and no NaN counts."""
    others = values[:expected] + values[expected + 1 :]
    return all(values[expected] > value for value in others)


def problem_of(url: str, file: str, expected: str, letter: str) -> str:
    """Say what is wrong with the answer of the model at `url` to an image's bytes, if anything."""
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=SECONDS)
    # Closed, because an idle connection would hold up the server's end.
    headers = {"Inference-Header-Content-Length": "0", "Connection": "close"}
    try:
        with open(file, "rb") as image:
            connection.request("POST", place.path, image.read(), headers)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}: {body[:200].decode(errors='replace')}")
        start = int(response.headers["Inference-Header-Content-Length"])
        values = [value for (value,) in struct.iter_unpack(f"<{letter}", body[start:])]
    except (OSError, http.client.HTTPException, ValueError, TypeError, struct.error) as error:
        return f"no answer from {url}: {error}"
    if int(expected) >= len(values):
        return f"{url} knows {len(values)} classes, the image is of class {expected}"
    if is_ahead(values, int(expected)):
        return ""
    return f"{url} answers {values[:20]}, class {expected} should be ahead"


if __name__ == "__main__":
    sys.exit(problem_of(*sys.argv[1:]) or 0)
