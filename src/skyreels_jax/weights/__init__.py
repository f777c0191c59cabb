"""Rule tables and the one engine that reads and writes checkpoints with them."""
