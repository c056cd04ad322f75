"""The leader's half: knows where every block is, and decides what is moved. No I/O, no clock, no bytes."""
