"""Engines that were started elsewhere and serve a run over HTTP."""
