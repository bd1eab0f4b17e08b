"""mecdeploy: quantisation-aware training that ends in a file people can serve."""

from pathlib import Path

__version__ = "0.1.0"

# A wheel holds the rooms inside this package, a checkout holds them beside it.
if not (Path(__file__).parent / "training").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
