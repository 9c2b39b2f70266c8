"""Runs at each interpreter start in the image: gives matplotlib its prepared font cache.

matplotlib reads the cache only from a directory that it may also write, and the image's root is read-only: so the
file is copied to `$MPLCONFIGDIR` (on a tmpfs), once. Without it the first plot would search all fonts again.
"""

import os
import sys


def seed() -> None:
    """Copy the font cache unless the directory exists already; a failure costs only matplotlib's own search."""
    target = os.environ.get("MPLCONFIGDIR")
    if not target or os.path.isdir(target):
        return
    source = os.path.join(sys.prefix, "share", "samovar")
    try:
        os.makedirs(target, exist_ok=True)
        for name in os.listdir(source):
            with open(os.path.join(source, name), "rb") as prepared:
                content = prepared.read()
            partial = os.path.join(target, f".{name}.{os.getpid()}")
            with open(partial, "wb") as copy:
                copy.write(content)
            os.replace(partial, os.path.join(target, name))
    except OSError:
        return


seed()
