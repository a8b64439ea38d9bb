"""What happened: counts, and their table.

- ``stats.py``: what happened: counted by the step runner, read by users and by the summary.
- ``summary.py``: the counts as a table: plain, by rich, and as HTML.
- ``timeline.py``: the time of each batch, in order.
- ``plot.py``: the figure of these times.
- ``logged.py``: the counts as numbers for loggers.
- ``html.py``: tables and paragraphs for notebooks.
"""
