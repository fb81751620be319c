"""The options of a run, in slices. A function asks for the slice it may read."""
