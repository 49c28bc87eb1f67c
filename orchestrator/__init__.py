"""The driver: which method, which roles, where, and in what order."""
