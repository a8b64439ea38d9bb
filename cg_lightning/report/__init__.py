"""What happened: counts, and their table.

- ``stats.py``: the counts of one callback: runners count, users and the summary read.
- ``records.py``: the rows of these counts: graphs, steps in a lower mode, times, padding.
- ``summary.py``: the counts as a table: plain, by rich, and as HTML.
- ``timeline.py``: the time of each batch, in order.
- ``plot.py``: the figure of these times.
- ``logged.py``: the counts as numbers for loggers.
- ``html.py``: tables and paragraphs for notebooks.
"""
