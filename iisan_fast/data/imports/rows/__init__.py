"""Read the rows of tables: interactions, times and titles."""
