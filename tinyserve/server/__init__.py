"""An OpenAI-compatible server: HTTP in, answers out. The only layer that knows HTTP.

Models, engines and text belong to the layers below; here are names, numbers and bytes on the wire.
"""
