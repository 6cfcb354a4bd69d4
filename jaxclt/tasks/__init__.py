"""Tasks whose answers are known: prompts with a foil and a counterfactual prompt.

Templates of our own, filled by a seed: `make("agreement", 50, seed=0, tokenizer=t)`.
Files of a user's own have the same form (`read_tasks`); `check` says which examples a
tokenizer takes.
"""

from jaxclt.tasks.files import read_tasks, write_tasks
from jaxclt.tasks.form import Checked, Example, check
from jaxclt.tasks.make import make
from jaxclt.tasks.templates import TASKS

__all__ = ["TASKS", "Checked", "Example", "check", "make", "read_tasks", "write_tasks"]
