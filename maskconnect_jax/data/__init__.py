"""Reads images from files into arrays. Imports no JAX."""
