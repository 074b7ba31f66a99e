"""`python -m mftmerge`, the same program as `mftmerge`."""

from mftmerge.cli import main

if __name__ == "__main__":
    main()
