"""What every room may use: errors, files, sizes, keyed draws. Imports nothing heavy."""
