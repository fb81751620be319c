"""The page: a typed API over the shell's commands and the files of runs. No torch; it never trains."""
