"""JSON lines and Parquet as tables, and folders of parts."""
