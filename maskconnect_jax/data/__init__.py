"""From files to arrays. Imports no JAX."""
