"""Experiment 4 of the course: KV as long-lived state, and how its residency bounds concurrency and waiting."""
