"""The processes of a run: placement, start, health, replacement, control from outside, and shutdown."""
