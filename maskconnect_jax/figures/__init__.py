"""Pictures, with matplotlib alone."""
