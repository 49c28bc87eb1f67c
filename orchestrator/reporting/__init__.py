"""What a run shows and writes down, and what the command line prints."""
