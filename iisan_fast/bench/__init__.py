"""Benchmarks: what each part costs, side by side with its reference, on one machine in one run."""
