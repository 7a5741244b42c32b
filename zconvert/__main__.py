"""`python -m zconvert` is the `zconvert` command."""

from zconvert.cli.main import main

if __name__ == "__main__":
    main()
