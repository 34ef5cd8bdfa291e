"""Trust in a running peer: certificates that stay valid, and who is kept out."""
