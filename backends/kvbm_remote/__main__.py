"""The old form of what `kvbm clear` does."""

from __future__ import annotations

import sys

from kvbm_core.command import ExitCode

if __name__ == "__main__":
    print(
        "`python -m kvbm_remote gc URL --max-age 7d --max-bytes 500GiB` is now "
        "`kvbm clear URL --older-than 7d --down-to 500GiB --yes`",
        file=sys.stderr,
    )
    raise SystemExit(ExitCode.WRONG)
