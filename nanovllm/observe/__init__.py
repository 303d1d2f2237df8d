"""Readers of the event stream: they change nothing, and import neither torch nor the engine."""
