"""Many runs in one folder: all of a grid, attacked and set in a table, or a search for the best of a space."""
