"""The laboratory: what looks at a server from outside. It speaks HTTP and imports no engine."""
