"""The PyTorch side: components of the hybrid pipeline, and witnesses for proofs."""
