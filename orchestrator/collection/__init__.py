"""Everything that happens to data before a role that is trained sees it."""
