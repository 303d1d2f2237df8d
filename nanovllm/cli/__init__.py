"""The command line: one verb a file. It parses, calls, prints; it decides nothing."""
