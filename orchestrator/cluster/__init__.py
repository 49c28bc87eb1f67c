"""Processes while a run lasts: started, watched, replaced, reached from outside and ended."""
