"""Loss, perplexity, bits per byte, token accuracy."""
