"""One file for each claim: what is compared, what is said of the measurements, and their picture."""
