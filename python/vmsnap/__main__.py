"""``python -m vmsnap``: the command line."""

from vmsnap.cli import main

if __name__ == "__main__":
    main()
