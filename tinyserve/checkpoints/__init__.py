"""From a name to files, and from files to named arrays. Nothing here knows what the arrays mean to a model."""
