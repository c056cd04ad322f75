"""The group `kvbm plugins`: what is installed, and new packages."""
