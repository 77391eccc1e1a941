"""Images of items: files and databases, listed, checked and decoded."""
