"""An aarch64 Debian guest under user-mode emulation, in which tests run real ARM peers."""
