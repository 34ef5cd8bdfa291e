"""What the home peer does for a run: feed it, watch it, collect what it has made."""
