"""`ldm4ts panel`: widgets over what the command line calls. Nothing is decided here."""
