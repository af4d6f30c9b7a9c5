"""Version of the package, and of the files it writes."""

__version__ = "0.1.0"

#: Layout of ``encoder.pt`` and ``model.json``. Raised when a file of the old layout could be misread.
FORMAT_VERSION = 1
