"""The worker's half: moves one rank's bytes, as planned. Decides nothing."""
