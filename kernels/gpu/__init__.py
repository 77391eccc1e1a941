"""The ops in Triton, for CUDA GPUs. Imported when an op first runs by this form."""
