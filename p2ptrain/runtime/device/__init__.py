"""What a peer notices of its own machine and links."""
