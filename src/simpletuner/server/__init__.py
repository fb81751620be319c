"""The web page and its typed API over the CLI's commands and the run files. It imports no torch and never trains."""
