"""The mathematics of sampling; knows no model."""
