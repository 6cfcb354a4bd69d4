"""Why heads attend: the cells of patterns that matter, and what makes their scores."""
