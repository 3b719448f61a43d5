"""Where a run's numbers go: metrics.jsonl, the progress line, pictures."""
