# SPDX-License-Identifier: MIT
"""`python -m pc_runner`, the same as `pc-run`."""

import sys

from pc_runner.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
