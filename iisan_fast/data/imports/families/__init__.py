"""Public layouts: which files they have, and their columns and forms."""
