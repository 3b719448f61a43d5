"""GPT-2 as in the paper."""
