"""What the leader knows of each tier: its objects, their order, its failures and its counters."""
