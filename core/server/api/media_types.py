"""Media types of replies, as routes declare them in ``opt["replies"]``."""

from __future__ import annotations

JSON, SSE, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"
