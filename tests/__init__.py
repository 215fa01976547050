"""A package, so that another one of this name which something installs does not stand in its place."""
