"""Options declared once: name, type, default, unit, meaning. Standard library only."""
