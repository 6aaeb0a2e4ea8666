"""Published settings, a file each: the expected figure, and whether it was run here."""
