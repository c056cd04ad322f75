"""Command line of the remote tier: ``python -m kvbm_remote gc URL``."""

from __future__ import annotations

import sys

from kvbm_remote._gc import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
