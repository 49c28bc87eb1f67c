"""Weights on their way from the role that trains them to the roles that use them."""
