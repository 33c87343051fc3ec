"""Files to named arrays. Nothing here knows what the arrays mean to a model."""
