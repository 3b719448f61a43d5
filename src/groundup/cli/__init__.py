"""From the command line to recipes."""
