"""What measures, renders and proves around the package: `make` calls it."""
