"""The four kinds of state: one language, four meanings (`kind.py` says of what)."""
