"""A batch as the driver knows it, a table of rows, and the stages that change it."""
