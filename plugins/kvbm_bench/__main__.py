"""`python -m kvbm_bench`."""

from kvbm_bench import main

main()
