"""Runs that wait for room: what is known of each, who is next, who makes room, and what follows a failure. Pure, but
for the file in which it is kept."""
