"""The command line: one file a verb; each loads, calls one function and prints."""
