"""Small random checkpoints to try things on."""
