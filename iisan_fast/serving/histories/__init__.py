"""Read the histories to rank for, from files and from Python."""
