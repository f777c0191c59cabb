"""PyTorch's side: for the hybrid pipeline and for proofs."""
