"""Media types of replies, as routes declare them in ``opt["replies"]``."""

from __future__ import annotations

JSON = "application/json"
"""Media type of replies that are one JSON value."""
SSE = "text/event-stream"
"""Media type of event streams; the declared type is that of one event's data."""
TEXT = "text/plain"
"""Media type of plain text."""
HTML = "text/html"
"""Media type of pages."""
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
"""The content type of metrics in Prometheus' text format."""
