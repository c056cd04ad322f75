"""The old form of `kvbm bench`, of which `--json FILE` is now `--out FILE`."""

from __future__ import annotations

import re
import sys

from kvbm_core.command import moved

if __name__ == "__main__":
    sys.argv[1:] = [re.sub(r"^--json\b", "--out", word) for word in sys.argv[1:]]
    moved("python -m kvbm_bench", "bench")
