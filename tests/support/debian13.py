"""Debian 13's bcc and compiler (LLVM 19) beside this machine's own: an interpreter that is the loader's instead.

Its packages come through apt, which checks them, into ~/.cache/otel-tcppktlat/debian13; nothing is installed.
"""

from __future__ import annotations

import pathlib
import re
import tempfile

from support import run_on_kernel
from support.agent import REPOSITORY

ROOT = run_on_kernel.CACHE.parent / "debian13"
# A mount namespace of its own, so that nothing is left on this machine; the repository is where it is.
_PYTHON = f"""#!/bin/sh
exec unshare --mount --propagation private sh -ec '
  for folder in /proc /sys /dev {REPOSITORY}; do mount --rbind $folder {ROOT}$folder; done
  exec chroot {ROOT} /usr/bin/python3 "$@"' sh "$@"
"""


def python(folder: pathlib.Path) -> pathlib.Path:
    """Debian 13's Python with its bcc, as an executable in `folder`. Fetched once; it takes root."""
    with run_on_kernel.cache_locked():
        if not ROOT.exists():
            _fetch()
    (ROOT / REPOSITORY.relative_to("/")).mkdir(parents=True, exist_ok=True)
    executable = folder / "python"
    executable.write_text(_PYTHON)
    executable.chmod(0o755)
    return executable


def _fetch() -> None:
    run_on_kernel.update_lists(again=False)
    from_nothing = ["-oDir::State::status=/dev/null", "--target-release=trixie", "--no-install-recommends"]
    plan = run_on_kernel.apt("apt-get", "--simulate", *from_nothing, "install", "python3-bpfcc", "libc-bin")
    packages = [f"{name}={version}" for name, version in re.findall(r"^Inst (\S+) \((\S+)", plan, re.MULTILINE)]
    with tempfile.TemporaryDirectory(dir=run_on_kernel.CACHE) as work:
        new = pathlib.Path(work, "new")
        run_on_kernel.unpack(packages, new)
        for name in ("bin", "sbin", "lib", "lib64"):
            if not (new / name).exists():
                (new / name).symlink_to(f"usr/{name}")
        for name in ("proc", "sys", "dev", "tmp"):
            (new / name).mkdir(exist_ok=True)
        new.rename(ROOT)
