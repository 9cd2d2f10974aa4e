"""What the papers say: draw, sum, freeze, prune. No config, no data."""
