"""A topology as text: places, SVG, Graphviz DOT and GraphML.

Neither JAX nor matplotlib is imported, so that a topology can draw itself in a
notebook, and the report page and the pictures place blocks alike. Blocks and
sources are numbered as in `method.topology`.
"""
