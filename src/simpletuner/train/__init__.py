"""Training, from a configuration to the exported weights: the only package that imports both the data and the model."""
