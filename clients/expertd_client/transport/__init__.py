"""How bytes get to a server and back: one seam, a file per carrier."""
