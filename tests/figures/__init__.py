"""A package, since other folders too hold a test_dynamics and test_topology."""
