"""Pictures, drawn with matplotlib alone.

A figure is a plain `matplotlib.figure.Figure`, without pyplot or a window. The
user's own matplotlib style does not change it, and stays unchanged. Blocks and
sources in arguments are numbered as in `method.topology`: source 0 is the
stem's output, and source i is the output of block i. Stages and branches count
from 0 in arguments and from 1 in pictures.
"""
