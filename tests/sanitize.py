# SPDX-License-Identifier: MIT
"""The compiled backend under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize` (g++, several minutes).

Builds csrc with both into a folder of its own, beside a copy of the Python package, and runs the tests of the compiled
backend there. The first finding ends the run. Arguments are handed to pytest in place of the list below.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
CXX = os.environ.get("CXX", "g++")
SANITIZERS = "-fsanitize=address,undefined"
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-fopenmp", "-fvisibility=hidden", SANITIZERS, "-fno-sanitize=vptr"]
FLAGS += ["-DTORCH_EXTENSION_NAME=_C", "-DPC_KERNELS_VERSION=sanitized", f"-DPC_KERNELS_TORCH={torch.__version__}"]
FLAGS += [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
NOUNS = "engine infer layer_ops precision native energies activations bad_input"


def compile_one(source: Path) -> Path:
    """The object file, made anew if anything in csrc is newer."""
    out = BUILD / f"{source.stem}.o"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*"))
    if out.exists() and out.stat().st_mtime > newest:
        return out
    print("compiling", source.relative_to(ROOT), flush=True)
    subprocess.run([CXX, *FLAGS, "-c", str(source), "-o", str(out)], check=True)
    return out


def build() -> None:
    """build/sanitize/pc_kernels: the package as it stands, with the instrumented extension."""
    BUILD.mkdir(parents=True, exist_ok=True)
    package = BUILD / "pc_kernels"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "pc_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted((ROOT / "csrc").rglob("*.cpp"))))
    libraries = Path(torch.__file__).parent / "lib"
    link = [f"-L{libraries}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", SANITIZERS, "-fopenmp", "-shared"]
    link += ["-o", str(package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")]
    subprocess.run([CXX, *map(str, objects), *link], check=True)


def runtime(name: str) -> str:
    """The compiler's own copy of a sanitizer's library, which must be loaded before anything else."""
    return os.path.realpath(subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip())


def main() -> int:
    """pytest's exit code; a finding aborts the process."""
    build()
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=1",  # Python and torch keep memory to the end
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(map(str, (BUILD, ROOT / "python", ROOT))),
        "PYTHONSAFEPATH": "1",  # or the package in the current folder would come first
        "PYTHONMALLOC": "malloc",  # every block of its own, with guards
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys"]  # findings go past Python
    command += ["-k", "not memory_does_not_grow"]  # freed memory is kept back here to catch its use
    command += sys.argv[1:] or [f"tests/test_{noun}.py" for noun in NOUNS.split()]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
