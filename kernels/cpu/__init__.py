"""The ops on a CPU: in C++, compiled for the processor it runs on; `target_rank` in PyTorch."""
