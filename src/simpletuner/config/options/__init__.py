"""The options of a run, in slices. A function takes only the slice that it reads."""
