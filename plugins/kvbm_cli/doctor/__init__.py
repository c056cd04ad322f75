"""The verb `kvbm doctor`: what this machine has, and what will be slow or fail on it, and why."""
