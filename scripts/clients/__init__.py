"""The usual calls of libraries that speak to OpenAI-compatible servers, a file for each.

scripts/record_clients.py makes them; nothing here knows who answers.
"""
