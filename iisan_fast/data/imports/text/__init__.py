"""Delimited text: compression, encodings, separators, headers and rows."""
