"""Stand-ins for the programs of examples/recipes, with the signatures of the sources that each recipe names.

Each keeps what a recipe relies on: hooks get a list of chunks and return it, weights arrive before or after the wrap,
and the optimizer is built last.
"""
