"""Write a page about a run: figures, curves, gates, and users with what they are recommended."""
