"""Spending less memory on any `nn.Module`, and tensors in files."""
