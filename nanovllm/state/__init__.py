"""The state plane: long-lived state as named objects that are placed, moved, verified and reclaimed."""
