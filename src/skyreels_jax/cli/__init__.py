"""The command line: parse, make a dataclass, call."""
