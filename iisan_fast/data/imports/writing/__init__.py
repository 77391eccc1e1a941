"""A dataset folder written from interactions, titles and covers."""
