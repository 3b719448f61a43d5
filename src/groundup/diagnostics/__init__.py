"""Is this machine, this data, this model, this training right? Each answer is a ``Check``."""
