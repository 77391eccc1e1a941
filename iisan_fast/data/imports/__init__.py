"""Other formats' interactions, titles and covers made into a dataset folder."""
