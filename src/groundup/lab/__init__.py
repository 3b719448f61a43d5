"""Claims about training as small experiments that anybody can repeat."""
