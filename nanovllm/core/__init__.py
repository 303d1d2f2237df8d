"""Plain data that everybody may import: standard library only, no torch, no numpy, no engine."""
