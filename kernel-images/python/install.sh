#!/bin/sh
# Runs inside the image's build: makes the virtual environment /opt/kernel from /wheels, ready for a read-only root.
set -eu

found=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$found" != "$PYTHON" ]; then
    echo "the base has Python $found, and the pinned wheels are for Python $PYTHON: choose a base with that one" >&2
    exit 1
fi

# The environment itself gets no pip: a sandbox has no network and its root is read-only, so it could install nothing.
python3 -m venv /build/pip
python3 -m venv --without-pip /opt/kernel
/build/pip/bin/pip --python /opt/kernel/bin/python install --no-cache-dir --no-index --no-deps --require-hashes --no-compile \
    --find-links /wheels --requirement /build/requirements.txt

site=$(/opt/kernel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# Libraries' own test suites and C headers: much of the size, of no use to a notebook.
find "$site" -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
rm -rf "$site"/pyarrow/include "$site"/pyarrow/src "$site"/numpy/_core/include
find "$site" -type f \( -name '*.pxd' -o -name '*.pyx' -o -name '*.a' \) -delete

# samovar_kernel is found here; seed_fonts copies the font cache to where matplotlib may write.
mkdir -p /opt/samovar
echo /opt/samovar > "$site/samovar.pth"
cp /build/seed_fonts.py "$site/samovar_seed_fonts.py"

# matplotlib's font cache, made once here instead of in the first cell of every sandbox.
mkdir -p /opt/kernel/share/samovar
MPLCONFIGDIR=/build/matplotlib MPLBACKEND=agg /opt/kernel/bin/python -B -c 'import matplotlib.font_manager'
cp /build/matplotlib/fontlist-*.json /opt/kernel/share/samovar/
echo 'import samovar_seed_fonts' > "$site/samovar_seed_fonts.pth"

# unchecked-hash: no source file is looked at when a module is imported, and file times do not matter.
/opt/kernel/bin/python -B -m compileall -q -j 0 --invalidation-mode unchecked-hash "$site" \
    || echo "some files of the packages do not compile: they are templates, or not meant for this Python"
