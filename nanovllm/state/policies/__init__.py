"""Eviction policies: what is worth keeping (scores), and who may go (selection), apart from each other."""
