"""The quickstart's results as a Markdown page."""

from __future__ import annotations

from mftmerge.quickstart.plan import Plan
from mftmerge.results import GridResult
