"""The laboratory: workloads, and what is measured with them, from outside over HTTP or offline beside an engine."""
