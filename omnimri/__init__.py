"""OmniMRI: one vision-language model for the whole MRI workflow, on Ray.

The four rooms (`jobs -> serve -> platform -> models`) stand at the top of the repository and are
linked into this package, so that they import as `omnimri.models.x` from a checkout, an editable
install, a wheel and a Ray working directory alike.
"""

from pathlib import Path

__version__ = "0.1.0"

# A checkout that lost its symbolic links (Windows, some archive tools) still imports.
if not (Path(__file__).parent / "platform").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
