"""The jobs of the command line, one module each: train a teacher, cache it, train students."""
