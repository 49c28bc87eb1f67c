"""The console and log files of a run, and the tables of the command line."""
