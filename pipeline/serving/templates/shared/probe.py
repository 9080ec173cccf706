"""Exit 0 if Triton classifies an image correctly, else 1: probe.py URL IMAGE CLASS TYPE.

Health endpoints stay green while every inference fails, so a health check has to infer. Runs
inside NVIDIA's container, with nothing but Python.
"""

import http.client
import struct
import sys
import urllib.parse

SECONDS = 4.0  # below the timeout of the probe that runs this


def is_ahead(values: list[float], expected: int) -> bool:
    """Return whether the class is above all others; not if values are equal or NaN."""
    others = values[:expected] + values[expected + 1 :]
    return all(values[expected] > value for value in others)


def find_problem(url: str, file: str, expected: str, letter: str) -> str:
    """Return what is wrong with the answer of the model at `url` to an image, or ""."""
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
        return f"{url} has {len(values)} classes, the image is of class {expected}"
    if is_ahead(values, int(expected)):
        return ""
    return f"{url} answers {values[:20]}, class {expected} should be highest"


if __name__ == "__main__":
    sys.exit(find_problem(*sys.argv[1:]) or 0)
