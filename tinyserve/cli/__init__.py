"""The command line: parses, calls, prints. One file per command; heavy imports live inside the functions."""
