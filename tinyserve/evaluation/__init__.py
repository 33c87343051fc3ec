"""Models measured: how fast they are, how likely they find a text, how often they are right."""
