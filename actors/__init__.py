"""Processes that hold weights. They know no method: they execute the objective that they are given."""
