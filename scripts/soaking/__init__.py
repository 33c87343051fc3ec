"""The parts of scripts/soak.py: which requests there are, and what must hold of answers and of the server."""
