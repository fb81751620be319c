"""Memory saving for any `nn.Module`, distributed training, and tensor files."""
