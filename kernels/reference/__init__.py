"""Every op in plain PyTorch: the specification of the other forms."""
