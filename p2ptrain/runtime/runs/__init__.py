"""Runs as every peer sees them: how they come about, change their views and end."""
