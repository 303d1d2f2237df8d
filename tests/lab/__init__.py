"""Tests of the laboratory, against servers that do what a script says."""
