"""Core's own controls: functions that the engine loop runs between two passes, which clients call by name."""
