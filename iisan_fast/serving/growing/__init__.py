"""Let the catalogue of a trained run grow and shrink."""
