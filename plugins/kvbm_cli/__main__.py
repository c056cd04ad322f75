"""`python -m kvbm_cli` is the command `kvbm`."""

from kvbm_cli import main

main()
