"""Training: noise levels, objectives. The loop around them is not written yet."""
