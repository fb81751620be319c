"""Utilities for all packages: errors, files, sizes, seeds of random draws. Imports nothing heavy."""
