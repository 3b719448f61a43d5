"""Decay groups and learning-rate schedules."""
