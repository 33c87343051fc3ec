"""An OpenAI-compatible server, and a client. Models and text belong to lower layers."""
