"""The machine we are on: device, precision, random streams, files that are whole or absent."""
