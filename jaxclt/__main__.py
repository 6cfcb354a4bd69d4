"""`python -m jaxclt` is the `jaxclt` command."""

from jaxclt.cli.main import main

if __name__ == "__main__":
    main()
