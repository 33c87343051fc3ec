"""What scripts/make_figures.py draws with: a parser of figures in letters, SVG by small functions, three layouts."""
