"""Files as such: whole or not there, checked as they are read; no model in them."""
