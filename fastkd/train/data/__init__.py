"""From files, folders and hubs to what a model reads."""
