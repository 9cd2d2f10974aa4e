"""Many runs: sweeps, their tables, and the dynamics of their real masks."""
