"""The reference profile of an exported file, made by ONNX Runtime of the bytes that ship."""

# Shape letters: N images.

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.core.evaluate import predict
from pipeline.core.files import check_digest
from pipeline.core.paths import Paths, packaged_name
from pipeline.data.splits import load_split
from pipeline.export.runtime import onnx_predictor
from pipeline.repository.reference_profile import ReferenceProfile, profile_of

EXPORT = "run 'pipeline export' again"


def profile_export(
    paths: Paths, manifest: Mapping[str, Any], precision: str, given: np.ndarray
) -> ReferenceProfile:
    """The profile of one file of an export, whose manifest this is.

    Of the validation split, which is neither what the network learned nor what it is scored on;
    of the images (N, ...) that it was proven on where somebody else's module was exported.
    """
    path, images, images_from = paths.variant(precision), given, "the images that it was proven on"
    digest = str(manifest["files"].get(path.name))
    content = check_digest(path, digest, EXPORT)
    if training := manifest.get("training"):
        dataset = training["dataset"]
        images = load_split(dataset, paths.data(dataset), "validation").images
        images_from = "the validation split"
    return profile_of(
        predict(onnx_predictor(content), images),
        images,
        manifest["kind"],
        name=packaged_name(paths.name, precision),
        precision=precision,
        sha256=digest,
        images_from=images_from,
        classes=tuple(manifest["classes"]),
        min_probability=manifest.get("min_probability"),
    )
