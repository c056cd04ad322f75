"""What tiers have of a prompt: found, asked for, and remembered while true."""
