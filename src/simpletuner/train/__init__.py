"""From a configuration to a trained adapter: the only room that knows both the data and the model."""
