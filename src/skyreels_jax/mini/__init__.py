"""The small models in the package: how they are made."""
