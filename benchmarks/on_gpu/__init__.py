"""Measure the project on a GPU in stages, the most telling first; ../on_gpu.sh starts it."""
