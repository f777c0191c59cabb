"""LoRA files: read from whatever wrote them, added to a transformer as it is loaded, written."""
