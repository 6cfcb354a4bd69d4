"""The `jaxclt` command: one file for each subcommand, on shared pieces."""
