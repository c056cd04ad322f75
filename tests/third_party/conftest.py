"""What strangers write is tested as theirs: installed, and in a process of its own."""

collect_ignore = ["kvbm_toy"]
