"""How blocks come into tiers and from tier to tier."""
