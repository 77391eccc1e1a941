"""The ops on a CPU: in C++, compiled for the machine at hand; the rank in PyTorch."""
