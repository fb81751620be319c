"""Flow matching as pure math on tensors: no configuration, no model, no global random state."""
