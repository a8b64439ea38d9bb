"""What happened: counts, and their table.

- ``stats.py``: the counts of one callback as users see them, with their table and figure.
- ``counts.py``: how runners count, and the sums that the summary and loggers read.
- ``records.py``: the rows of these counts: graphs, steps in a lower mode, times, padding.
- ``summary.py``: the counts as a table: plain, by rich, and as HTML.
- ``timeline.py``: the time of each batch, in order.
- ``plot.py``: the figure of these times.
- ``logged.py``: the counts as numbers for loggers.
- ``html.py``: tables and paragraphs for notebooks.
"""
