"""Pure functions, and rules of the code base."""
