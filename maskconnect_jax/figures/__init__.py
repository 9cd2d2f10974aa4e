"""Pictures, drawn with matplotlib alone.

A figure is a plain `matplotlib.figure.Figure`: no pyplot, no window, and the
user's own matplotlib style neither changes it nor is changed. Blocks and
sources in arguments are numbered as in `method.topology`: source 0 is the
stem's output and source i that of block i. Stages and branches count from 0
in arguments and from 1 in pictures.
"""
