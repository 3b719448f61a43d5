"""Optimizers, their decay groups, and learning-rate schedules."""
