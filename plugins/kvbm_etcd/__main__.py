"""Command line: ``python -m kvbm_etcd ls`` and ``watch``."""

from __future__ import annotations

import sys

from kvbm_etcd._list import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
