"""Where two implementations differ, and what kind of fault it is."""
