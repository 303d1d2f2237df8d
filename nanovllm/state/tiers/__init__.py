"""Tiers: where bytes lie. One small protocol (`tier.py`), one file a tier."""
