"""The ops on a CPU: in C++, compiled for the machine at hand, and in PyTorch."""
