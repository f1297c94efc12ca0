"""What is measured and not asserted: `./dev bench`, `./dev soak`."""
