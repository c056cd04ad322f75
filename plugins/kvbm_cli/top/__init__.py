"""The verbs `kvbm top` and `kvbm status`: what a server's `/metrics` says of each tier."""
