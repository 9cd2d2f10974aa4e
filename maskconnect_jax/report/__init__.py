"""The report page: one HTML file, opened from disk, that loads nothing.

The drawings are SVG written here, not by a plotting library: their colours are
the page's custom properties, so that one drawing serves light and dark, and
each part can be focused and named. Altair with Vega inlined would be a megabyte
of script a page, and matplotlib's SVG has its colours built in.
"""
