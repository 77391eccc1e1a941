"""The ops in plain PyTorch, one file each: the specification of the other forms."""
