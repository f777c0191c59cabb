"""Pure functions of arrays: attention, masks, rotary positions, norms, convolutions."""
