"""What other tools run, each file in an environment of its own."""
