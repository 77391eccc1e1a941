"""Export a run for programs without this package: tables, encoders, and an index."""
