"""Engines that sample, the actor around them, and the weights that reach them."""
