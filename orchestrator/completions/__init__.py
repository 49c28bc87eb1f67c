"""Completions between runs: sampled of a model, scored, evaluated. Each is a run of one phase that trains nothing, so
that it has a run's folder, fleet, retries and resumption."""
