"""The ICBM 152 2009a brain template that nilearn ships: T1, grey and white matter, without skull, 1 mm, RAS.

The notice of the Montreal Neurological Institute permits use, copying and changes for any purpose.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Literal

import nibabel as nib

_FILES = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


def load_map(name: Literal["t1", "gm", "wm"]) -> nib.Nifti1Image:
    """One of the template's maps, uint8 `(X, Y, Z)` in its `dataobj`, with the affine to MNI mm.

    Raises:
        ValueError: If nilearn is not installed or does not hold the file.
    """
    spec = importlib.util.find_spec("nilearn")
    # Importing nilearn takes seconds in every worker; only its files are wanted.
    folder = Path(spec.origin).parent / "datasets" / "data" if spec and spec.origin else Path("nilearn")
    path = folder / _FILES.format(name)
    if not path.is_file():
        raise ValueError(f"{folder} does not hold the MNI152 template. Install nilearn 0.14: pip install nilearn.")
    # In memory at once: a lazily read image would leave its file open.
    return nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
