"""Documents to shards to batches."""
