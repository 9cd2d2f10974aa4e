"""Many runs: sweeps, their tables, and what their masks did."""
