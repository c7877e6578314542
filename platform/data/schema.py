"""The row schema: one row per volume, versioned, in plain Parquet that any reader opens.

Arrays travel as a struct of raw bytes, shape and dtype, so that volumes of any size and complex k-space share a
column without pickling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 3
READABLE_VERSIONS = (2, 3)
"""Versions of corpora that `shards` reads: columns that version 2 lacks read as null."""

ARRAY = pa.struct([("data", pa.large_binary()), ("shape", pa.list_(pa.int64())), ("dtype", pa.string())])

BOX = pa.struct(
    [
        ("label", pa.string()),
        ("side", pa.string()),
        # Voxel box of the native grid, half-open: [z1, y1, x1, z2, y2, x2].
        ("box_voxel", pa.list_(pa.int64())),
    ]
)

MEASUREMENT = pa.struct(
    [
        # Words are the meanings of standard codes in lower case; a null one was not coded.
        ("name", pa.string()),  # volume; apparent diffusion coefficient, mean
        ("value", pa.float64()),
        ("unit", pa.string()),  # UCUM code: mm, mm3, 1
        ("finding", pa.string()),  # lesion
        ("site", pa.string()),  # peripheral zone of prostate
        ("laterality", pa.string()),  # left | right | bilateral
    ]
)

QUALITY_MEASURES = ("snr", "efc", "fber", "ghosting", "cjv")
"""See omnimri.platform.data.intake.quality."""

SCHEMA = pa.schema(
    [
        # Identity: pseudonyms only.
        ("row_id", pa.string()),
        ("schema_version", pa.int32()),
        ("dataset", pa.string()),
        ("licence", pa.string()),
        ("split", pa.string()),  # train | val | test, by patient
        ("split_origin", pa.string()),  # drawn | official | moved: see IngestConfig.split_by
        ("patient_id", pa.string()),
        ("study_id", pa.string()),
        ("series_id", pa.string()),
        ("source_format", pa.string()),  # dicom, nifti, fastmri, ismrmrd, nrrd... (see readers.VOLUME_KINDS)
        ("simulated", pa.bool_()),
        # The volume on its native grid; see omnimri.models.scan.Scan for the conventions.
        ("image", ARRAY),  # (Z, Y, X); 16-bit where that loses nothing, else float32: see pack_image
        ("affine", pa.list_(pa.float64())),  # 16 numbers, row-major 4x4, (x, y, z, 1) index -> RAS mm
        ("spacing_mm", pa.list_(pa.float64())),  # (z, y, x)
        ("shape", pa.list_(pa.int64())),  # (Z, Y, X)
        ("kspace", ARRAY),  # complex64 (Z, C, Y, X) or null
        ("mask", ARRAY),  # bool (X,) or null when fully sampled
        # Annotation.
        ("label_map", ARRAY),  # uint8 (Z, Y, X) or null
        ("label_names", pa.map_(pa.int32(), pa.string())),
        ("boxes", pa.list_(BOX)),  # null: not annotated; empty: annotated, nothing there
        ("classes", pa.list_(pa.string())),  # diagnoses; null: not annotated
        ("measurements", pa.list_(MEASUREMENT)),  # of structured reports; null: none that is used
        ("report", pa.string()),
        ("description", pa.string()),  # JSON, five levels of the paper's Figure 2
        ("description_origin", pa.string()),  # JSON, field -> header | label | report | generated
        # Acquisition facts; null means unknown.
        ("contrast", pa.string()),
        ("quantitative", pa.bool_()),  # a map of a physical quantity
        ("quantity", pa.string()),  # which one, and its unit as the file states it: see omnimri.models.quantities
        ("quantity_unit", pa.string()),
        ("contrast_agent", pa.bool_()),
        ("acquisition_type", pa.string()),  # 2D | 3D
        ("plane", pa.string()),
        ("body_part", pa.string()),
        ("vendor", pa.string()),
        ("model_name", pa.string()),
        ("field_strength_t", pa.float64()),
        ("tr_ms", pa.float64()),
        ("te_ms", pa.float64()),
        ("ti_ms", pa.float64()),
        ("flip_angle_deg", pa.float64()),
        ("sex", pa.string()),  # F | M | O
        ("age_years", pa.float64()),
        # Quality; a null measure could not be computed.
        ("quality", pa.struct([(name, pa.float64()) for name in QUALITY_MEASURES])),
        ("flags", pa.list_(pa.string())),
        ("fingerprint", pa.string()),
        ("preprocessing_version", pa.string()),  # how voxels were made of the file: see writer.preprocessing_version
    ],
    metadata={"omnimri_schema_version": str(SCHEMA_VERSION)},
)

FLAGS = (
    "low SNR", "ghosting", "tissues not separable", "small matrix", "near copy", "face may be recognisable",
    "defaced", "prewhitened", "not prewhitened",
)  # fmt: skip
"""What intake may flag a volume for; `near copy` is followed by the row that it resembles, `defaced` by
the method, `not prewhitened` by why."""

FACTS = (
    "contrast", "quantitative", "quantity", "quantity_unit", "contrast_agent", "acquisition_type", "plane", "body_part",
    "vendor", "model_name", "field_strength_t", "tr_ms", "te_ms", "ti_ms", "flip_angle_deg", "sex", "age_years",
)  # fmt: skip
"""Columns that a reader may fill from a header, and `Scan.facts` carries."""


def pack_array(array: np.ndarray | None) -> dict[str, Any] | None:
    """An array as the ARRAY struct; None stays None."""
    if array is None:
        return None
    contiguous = np.ascontiguousarray(array)
    return {"data": contiguous.tobytes(), "shape": list(contiguous.shape), "dtype": contiguous.dtype.str}


def pack_image(image: np.ndarray) -> dict[str, Any]:
    """A volume as the ARRAY struct, in 16 bits where every value is a whole number that fits.

    Most scanners store whole numbers: half the bytes to digest, compress, keep and read. `shards.load_row` gives
    float32 in both cases.

    Args:
        image: float32 `(Z, Y, X)`.
    """
    with np.errstate(invalid="ignore"):  # of values that do not fit, which then differ
        whole = image.astype(np.uint16 if image.min() >= 0 else np.int16)
    packed = pack_array(whole if np.array_equal(whole, image) else image)
    assert packed is not None
    return packed


def unpack_array(packed: dict[str, Any] | None) -> np.ndarray | None:
    """Inverse of `pack_array`; the result shares the bytes and is read-only."""
    if packed is None:
        return None
    dtype = np.dtype(packed["dtype"])
    if dtype.hasobject:
        raise ValueError(f"Array column holds dtype {dtype}, which would need pickle; expected a plain number type.")
    return np.frombuffer(packed["data"], dtype=dtype).reshape(packed["shape"])
