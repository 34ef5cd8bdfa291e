"""The command line: it parses, asks the peer of this device, and prints.

Modules of this folder import only click and plain words at the top; whatever is heavy is
imported by the command that needs it, so that `p2ptrain --help` is quick.
"""
