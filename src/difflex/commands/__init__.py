"""The verbs of the command line, one file each: frozen dataclasses whose fields are the flags; calling one does the work."""
