"""What happened: counts, and their table.

- ``stats.py``: what happened: counted by the step runner, read by users and by the summary.
- ``summary.py``: the counts as a plain table.
"""
