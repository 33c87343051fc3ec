"""An OpenAI-compatible server, and a client. Only this package knows HTTP; models and text belong to lower layers."""
