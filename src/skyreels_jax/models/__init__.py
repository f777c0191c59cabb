"""NNX modules, each beside the frozen config it takes."""
