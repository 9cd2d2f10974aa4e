"""One run: from a config to a model folder, and back from it."""
