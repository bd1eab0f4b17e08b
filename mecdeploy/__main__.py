"""`python -m mecdeploy`."""

from mecdeploy.cli import main

if __name__ == "__main__":
    main()
