"""The papers' method: draw, sum, freeze, prune. It reads no config, no data."""
