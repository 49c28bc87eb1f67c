"""A phase of a run from its start, or a checkpoint inside it, to its last step; what it starts from and leaves."""
