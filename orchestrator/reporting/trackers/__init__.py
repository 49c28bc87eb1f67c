"""Trackers: libraries that keep the metrics of runs and show them. They get what `metrics.jsonl` gets."""
