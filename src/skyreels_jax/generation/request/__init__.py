"""What is asked for: declared once in `settings`, resolved against a checkpoint by `resolve`."""
