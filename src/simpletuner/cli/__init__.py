"""The command `simpletuner`: one module for each subcommand."""
