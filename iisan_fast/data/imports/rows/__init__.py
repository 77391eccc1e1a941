"""What is read from the rows of tables: interactions, times and titles."""
