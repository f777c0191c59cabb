"""From a request to a video; knows the components only as protocols."""
