"""The transcoder: dictionaries, what is active on a prompt, encode and decode."""
