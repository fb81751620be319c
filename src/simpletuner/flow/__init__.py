"""Flow matching as pure maths on tensors: no configuration, no model, no global random state."""
