"""`python -m lalia` is the command `lalia`."""

from lalia.cli import main

if __name__ == "__main__":
    main()
