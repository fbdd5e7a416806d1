# SPDX-License-Identifier: MIT
"""What the CUDA kernels take of the chips they are built for: `python -m benchmarks.cuda_resources`.

nvcc compiles every file of csrc/cuda for every architecture of setup.py's default; nothing is run. A spill or a stack
frame makes it fail.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.run import machine

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "cuda_resources.json"
ARCHITECTURES = ("80", "90a", "100")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
USED = re.compile(
    r"Compiling entry function .(\w+).*?(\d+) bytes stack frame, (\d+) bytes spill stores"
    r".*?Used (\d+) registers(.*?)\n",
    re.DOTALL,
)


def readable(mangled: str) -> str:
    """The kernel's name and the type that it is made for."""
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=False)
    name = done.stdout.strip().split("(pc::")[0].replace("pc::", "").replace("(anonymous namespace)::", "")
    return name.removeprefix("void ").strip() or mangled


def compiled(source: Path, architecture: str) -> list[dict[str, Any]]:
    """The kernels of a file on one architecture."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = [str(NVCC), "-std=c++17", "-O3", "-Xptxas", "-v", "-gencode", target, "-c", str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/a.o"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    rows = []
    for name, stack, spills, registers, rest in USED.findall(done.stdout + done.stderr):
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append(
            {
                "file": source.name, "kernel": readable(name), "target": f"sm_{architecture}",
                "registers": int(registers), "stack": int(stack), "spills": int(spills),
                "static_shared": int(shared[1]) if shared else 0,
            }
        )  # fmt: skip
    return rows


def main() -> int:
    """Writes the JSON; 1 if anything spills."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_resources", description=__doc__)
    parser.parse_args()
    if NVCC is None:
        raise SystemExit("nvcc is not installed")
    release = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    rows = [
        row
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        for architecture in ARCHITECTURES
        for row in compiled(source, architecture)
    ]
    for row in rows:
        print(*row.values())
    found = re.search(r"release ([\d.]+)", release)
    document = {
        "command": "python -m benchmarks.cuda_resources", "machine": machine(), "note": "compiled, nothing measured",
        "nvcc": found[1] if found else release, "kernels": rows,
    }  # fmt: skip
    OUT.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(row["stack"] or row["spills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
