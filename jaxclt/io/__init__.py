"""Files and names: models, dictionaries, tokenizers, graphs, downloads."""
