"""The command `simpletuner`: one module for each of its words."""
