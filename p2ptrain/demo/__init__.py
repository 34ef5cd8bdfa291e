"""The demonstration: a throwaway group of three peers trains a small model on this machine."""
