"""Spending less memory on any `nn.Module`."""
