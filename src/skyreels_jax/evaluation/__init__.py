"""How good the videos are."""
