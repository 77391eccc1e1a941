"""Benchmarks: time, memory and accuracy of every part beside its reference, on one machine in one run."""
