"""`python -m kvtool` is the same program as `kvtool`."""

from kvtool.cli import main

if __name__ == "__main__":
    main()
