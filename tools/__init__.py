"""Tools around the package that measure, render and validate; `make` calls them."""
