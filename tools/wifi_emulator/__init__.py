"""An access point of our own between network namespaces: one shared medium, without netem."""
