"""The gateway: everything that speaks to the outside."""

from importlib import metadata

try:
    __version__ = metadata.version("samovar")
except metadata.PackageNotFoundError:
    # Run from a checkout that was not installed.
    __version__ = "0+checkout"
