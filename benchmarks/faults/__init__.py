"""Make faults on purpose: kill processes, flip bits of files, and change the files that are read."""
