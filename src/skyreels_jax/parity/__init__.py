"""Whether two implementations are the same model."""
