"""An OpenAI-compatible server: HTTP in, answers out. The only floor that knows HTTP.

Models, engines and text belong to the floors below; here are names, numbers and bytes on the wire.
"""
