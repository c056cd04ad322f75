"""Who shares the tiers, and what must stay for a time."""
