"""The configuration of a run: its schema, how it is loaded, and why one is refused."""
