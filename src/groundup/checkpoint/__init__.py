"""The commit protocol: a checkpoint is whole, verified and durable, or it does not exist."""
