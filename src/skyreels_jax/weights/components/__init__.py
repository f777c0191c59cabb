"""One module per component: its weight table, its configuration in files, and how it is opened."""
