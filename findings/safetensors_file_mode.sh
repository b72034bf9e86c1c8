#!/usr/bin/env bash
# safetensors 0.8.0 beside 0.7.0, numpy 2.2.6.
#
# Since 0.8 save_file writes a new file and renames it to the name that it is given. So the file can
# be read by its owner alone, whatever the umask says and whatever mode a file of that name had; and
# where the name is a symbolic link, the link itself is replaced, and the file that it points to
# stays as it was. Up to 0.7 it wrote into the file, as open(name, "wb") does.
#
# Seen, with the umask 022:
#     0.7.0: mode 644; the link stays, and its target is written
#     0.8.0: mode 600; the link becomes a file, its target is empty still
#
# It exits 0 while this is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
for version in 0.7.0 0.8.0; do
    venv/bin/pip install --quiet --disable-pip-version-check numpy==2.2.6 "safetensors==$version"
    rm -f new link target
    venv/bin/python - "$version" <<'PROGRAM'
import os
import stat
import sys

import numpy as np
from safetensors.numpy import save_file

os.umask(0o022)
save_file({"x": np.zeros(3)}, "new")
mode = stat.S_IMODE(os.stat("new").st_mode)
open("target", "w").close()
os.symlink("target", "link")
save_file({"x": np.zeros(3)}, "link")
stays, written = os.path.islink("link"), os.path.getsize("target") > 0
link = "the link stays" if stays else "the link becomes a file"
target = "its target is written" if written else "its target is empty still"
print(f"{sys.argv[1]}: mode {mode:o}; {link}, {target}")
expected = {"0.7.0": (0o644, True, True), "0.8.0": (0o600, False, False)}
assert (mode, stays, written) == expected[sys.argv[1]]
PROGRAM
done
