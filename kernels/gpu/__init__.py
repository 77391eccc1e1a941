"""The ops in Triton, for CUDA GPUs. A module is imported when its op first runs in this form."""
